"""What a request leaves open, decided once its model and its prompt's tokens are known; what that model
cannot do is refused here, before any work is done."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import msgspec

from mlx_serving.content.text import TextSide
from mlx_serving.errors import ContextOverflow, InvalidRequest
from mlx_serving.types import ChatPrompt, GenerateRequest, ModelInfo, Prompt, SamplingParams


def check_generates(info: ModelInfo) -> None:
    """Raises InvalidRequest for a model that gives no text."""
    if info.kind != "decoder":
        use = "/v1/rerank" if info.kind == "reranker" else "/v1/embeddings"
        raise InvalidRequest(
            f"'{info.model_id}' gives {'scores' if info.kind == 'reranker' else 'vectors'}, not text; "
            f"use {use}.",
            param="model",
        )


def check_thinks(prompt: Prompt, info: ModelInfo, text: TextSide) -> None:
    """Raises InvalidRequest where the answer is to be thought over and the model cannot: Ollama's words,
    by which its clients know it."""
    if isinstance(prompt, ChatPrompt) and prompt.thinks and "thinking" not in text.abilities():
        raise InvalidRequest(f'"{info.model_id}" does not support thinking', param="think")


def settle(
    request: GenerateRequest, info: ModelInfo, prompt_tokens: int, default_max_tokens: int | None
) -> SamplingParams:
    """The sampling parameters with everything decided that the client left open; raises what the
    model cannot do."""
    room = check_room(request.prompt, prompt_tokens, info)
    sampling = request.sampling
    check_ids("logit_bias", sampling.logit_bias, info.vocab_size)
    check_ids("stop_token_ids", sampling.stop_token_ids, info.vocab_size)
    wanted = request.max_tokens if request.max_tokens is not None else default_max_tokens
    return msgspec.structs.replace(
        sampling,
        max_tokens=room if wanted is None else min(wanted, room),
        seed=secrets.randbits(63) if request.seed is None else request.seed,
    )


def check_room(prompt: Prompt, prompt_tokens: int, info: ModelInfo) -> int:
    """The tokens that the context leaves for an answer. Raises ContextOverflow."""
    room = info.context_length - prompt_tokens
    if room < 1:
        raise ContextOverflow(
            f"The prompt has {prompt_tokens} tokens or more; the context of '{info.model_id}' is "
            f"{info.context_length} and at least one must be left to generate.",
            param="messages" if isinstance(prompt, ChatPrompt) else "prompt",
        )
    return room


def constrain(request: GenerateRequest, text: TextSide, token_ids: list[int]) -> GenerateRequest:
    """The request with the grammar that its `tool_choice` or strict functions mean, or with its own
    after the model's reasoning."""
    prompt, grammar = request.prompt, request.grammar
    if not isinstance(prompt, ChatPrompt):
        return request
    if grammar is not None and not prompt.tools:
        before = text.reasoning_rules(prompt, token_ids)
        grammar = msgspec.structs.replace(grammar, before=before)
        return msgspec.structs.replace(request, grammar=grammar)
    if grammar is not None:
        raise InvalidRequest(
            f"'{grammar.param}' says what the whole answer looks like, so nothing could call 'tools'.",
            param=grammar.param,
        )
    forced = text.forced_calls(prompt, token_ids)
    return request if forced is None else msgspec.structs.replace(request, grammar=forced)


def check_ids(param: str, ids: Sequence[int] | dict[int, float], vocab_size: int) -> None:
    """Raises InvalidRequest for a token id that there is not."""
    for token_id in ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(
                f"Token id {token_id} is not in the vocabulary of {vocab_size}.", param=param
            )
