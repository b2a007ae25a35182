"""The first answers of a model that has just been loaded, which nobody asked for: what is compiled or
cached on first use is there when the first request comes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from mlx_serving.errors import MLXServingError, ModelBroken
from mlx_serving.generation import Served
from mlx_serving.model_entry import WarmUpChat
from mlx_serving.settle import check_room
from mlx_serving.types import ChatPrompt, Message, Priority, Prompt, SamplingParams, TextPrompt
from mlx_serving.worker.port import WorkerClient

ANSWER_TOKENS = 16


async def warm_up(
    worker: WorkerClient,
    served: Served,
    prompts: Sequence[str | WarmUpChat],
    priority: Priority = Priority.NORMAL,
) -> None:
    """Have the model answer each of them, one after the other. Raises ModelBroken that names the one
    which it cannot answer."""
    for i, prompt in enumerate(prompts):
        try:
            await _answer(worker, served, _prompt(prompt, served), priority)
        except MLXServingError as error:
            model = served.info.model_id
            why = f"'{model}' cannot be warmed up: warm_up[{i}]: {error.message}"
            raise ModelBroken(why, code="warm_up_failed") from error


async def _answer(worker: WorkerClient, served: Served, prompt: Prompt, priority: Priority) -> None:
    token_ids = await asyncio.to_thread(served.text.encode_prompt, prompt)
    room = check_room(prompt, len(token_ids), served.info)
    sampling = SamplingParams(temperature=0.0, max_tokens=min(ANSWER_TOKENS, room))
    pooled = served.info.kind != "decoder"
    model_id = served.info.model_id
    async with worker.submit(
        model_id, token_ids, sampling, pooled=pooled, priority=priority
    ) as rows:
        async for _ in rows:
            pass


def _prompt(prompt: str | WarmUpChat, served: Served) -> Prompt:
    """As a chat's client would send it, where the model has chats."""
    chat = WarmUpChat(user=prompt) if isinstance(prompt, str) else prompt
    if served.text.template is None or served.info.kind != "decoder":
        return TextPrompt(text="\n".join(part for part in (chat.system, chat.user) if part))
    messages = [Message(role="user", content=chat.user)]
    if chat.system is not None:
        messages.insert(0, Message(role="system", content=chat.system))
    return ChatPrompt(messages=tuple(messages))
