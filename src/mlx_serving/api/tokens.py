"""vLLM's /tokenize and /detokenize."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from mlx_serving.api.body import convert, read_object
from mlx_serving.api.disposition import check
from mlx_serving.api.exchange import Exchange
from mlx_serving.api.openai_request import chat_call
from mlx_serving.api.port import GatewayPort
from mlx_serving.api.tokens_fields import DETOKENIZE, TOKENIZE
from mlx_serving.errors import InvalidRequest
from mlx_serving.types import Prompt, TextPrompt

_OF_CHATS = (
    "add_generation_prompt",
    "continue_final_message",
    "chat_template_kwargs",
    "tools",
)
Model = Annotated[str, Meta(min_length=1)]


class _Tokenize(msgspec.Struct, kw_only=True):
    model: Model | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None


class _Detokenize(msgspec.Struct, kw_only=True):
    tokens: Annotated[list[Annotated[int, Meta(ge=0, lt=2**31)]], Meta(max_length=2**20)]
    model: Model | None = None


SHAPES: Mapping[str, type[msgspec.Struct]] = {"/tokenize": _Tokenize, "/detokenize": _Detokenize}


class TokenRoutes:
    def __init__(self, gateway: GatewayPort) -> None:
        self._gateway = gateway
        self._live = gateway.live

    async def tokenize(self, exchange: Exchange) -> None:
        raw = read_object(await exchange.body(self._live.config.max_body_bytes))
        check(TOKENIZE, raw)
        body = convert(raw, _Tokenize)
        model = body.model or self._gateway.default_model()
        token_ids = await self._gateway.tokenise(model, _prompt(body, raw))
        info = self._gateway.model_info(model)
        answer = {
            "count": len(token_ids),
            "max_model_len": info.context_length if info else None,
            "tokens": token_ids,
            "token_strs": None,
        }
        await exchange.respond(200, msgspec.json.encode(answer))

    async def detokenize(self, exchange: Exchange) -> None:
        raw = read_object(await exchange.body(self._live.config.max_body_bytes))
        check(DETOKENIZE, raw)
        body = convert(raw, _Detokenize)
        model = body.model or self._gateway.default_model()
        text = await self._gateway.detokenise(model, body.tokens)
        await exchange.respond(200, msgspec.json.encode({"prompt": text}))


def _prompt(body: _Tokenize, raw: dict[str, Any]) -> Prompt:
    if body.messages is not None:
        if body.prompt is not None:
            raise InvalidRequest("Send 'prompt' or 'messages', not both.", param="prompt")
        if body.add_special_tokens:
            raise InvalidRequest("The chat template adds them.", param="add_special_tokens")
        chat = {name: raw[name] for name in ("messages", *_OF_CHATS) if name in raw}
        return chat_call(chat, default_model="").requests[0].prompt
    if body.prompt is None:
        raise InvalidRequest("'prompt' or 'messages' is missing.", param="prompt")
    for name in _OF_CHATS:
        if getattr(body, name) is not None:
            raise InvalidRequest(f"'{name}' is for 'messages' only.", param=name)
    return TextPrompt(text=body.prompt, add_special_tokens=body.add_special_tokens is not False)
