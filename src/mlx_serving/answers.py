"""The library's side of a request: what `Engine` takes as prompt and parameters, and what it gives."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from mlx_serving.content import structured
from mlx_serving.content.tools.definitions import tool_use
from mlx_serving.errors import InvalidRequest, UnsupportedParameter
from mlx_serving.generation import Generation
from mlx_serving.types import (
    ChatPrompt,
    EmbedRequest,
    FinishReason,
    GenerateRequest,
    Message,
    Priority,
    Prompt,
    RankRequest,
    SamplingParams,
    TextLogprob,
    TextPrompt,
    TokenEvent,
    TokenPrompt,
    ToolCallDelta,
    Usage,
)

T = TypeVar("T")

PromptLike = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text, token ids, or chat messages."""
TextsLike = str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]]
"""A text or its token ids, or several of either."""

_SAMPLING = frozenset(SamplingParams.__struct_fields__) - {"seed", "choice", "max_tokens"}
_REQUEST = frozenset(
    {
        "max_tokens",
        "seed",
        "n",
        "stop",
        "include_stop_str",
        "priority",
        "cache_salt",
        "caching",
        "grammar",
        "keep_alive_s",
        "session",
        "timeout_s",
    }
)
_TOOL_USE = ("tools", "tool_choice", "parallel_tool_calls")
_CHAT = frozenset({*_TOOL_USE, "template_kwargs", "reasoning_effort", "response_format"})
PARAMS = _SAMPLING | _REQUEST | _CHAT
"""What a call of `Engine.generate` and its like may name."""


class Chunk(msgspec.Struct, frozen=True, kw_only=True):
    """New text of one choice."""

    text: str
    token_ids: tuple[int, ...]
    choice: int = 0
    logprobs: tuple[TextLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A call that the model made. `arguments` is JSON text, as the model wrote it."""

    id: str
    name: str
    arguments: str


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """One choice, whole."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TextLogprob, ...] | None = None
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that one request gave. `text` is the first choice's."""

    request_id: str
    answers: tuple[Answer, ...]
    usage: Usage
    seed: int

    @property
    def text(self) -> str:
        return self.answers[0].text

    @property
    def reasoning(self) -> str:
        return self.answers[0].reasoning

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        return self.answers[0].tool_calls


def chunk_of(event: TokenEvent) -> Chunk:
    return Chunk(
        text=event.text,
        token_ids=tuple(event.token_ids),
        choice=event.choice,
        logprobs=None if event.logprobs is None else tuple(event.logprobs),
        finish_reason=event.finish_reason,
        reasoning=event.reasoning,
        tool_calls=tuple(event.tool_calls or ()),
    )


async def collect(generation: Generation) -> Completion:
    n = generation.request.n
    texts: list[list[str]] = [[] for _ in range(n)]
    ids: list[list[int]] = [[] for _ in range(n)]
    logprobs: list[list[TextLogprob]] = [[] for _ in range(n)]
    reasons: list[FinishReason] = ["stop"] * n
    thoughts: list[list[str]] = [[] for _ in range(n)]
    calls: list[list[ToolCallDelta]] = [[] for _ in range(n)]
    try:
        async for events in generation:
            for event in events:
                texts[event.choice].append(event.text)
                ids[event.choice] += event.token_ids
                logprobs[event.choice] += event.logprobs or ()
                thoughts[event.choice].append(event.reasoning)
                calls[event.choice] += event.tool_calls or ()
                if event.finish_reason is not None:
                    reasons[event.choice] = event.finish_reason
    finally:
        generation.cancel()
    wanted = generation.request.sampling.logprobs is not None
    return Completion(
        request_id=generation.request_id,
        answers=tuple(
            Answer(
                text="".join(texts[i]),
                token_ids=tuple(ids[i]),
                finish_reason=reasons[i],
                logprobs=tuple(logprobs[i]) if wanted else None,
                reasoning="".join(thoughts[i]),
                tool_calls=_join_calls(calls[i]),
            )
            for i in range(n)
        ),
        usage=generation.usage(),
        seed=generation.seed,
    )


def _join_calls(deltas: Sequence[ToolCallDelta]) -> tuple[ToolCall, ...]:
    pieces: dict[int, list[ToolCallDelta]] = {}
    for delta in deltas:
        pieces.setdefault(delta.index, []).append(delta)
    return tuple(
        ToolCall(
            id=parts[0].id or "",
            name=parts[0].name or "",
            arguments="".join(part.arguments for part in parts),
        )
        for parts in pieces.values()
    )


def to_request(prompt: PromptLike, model: str, params: Mapping[str, Any]) -> GenerateRequest:
    unknown = set(params) - PARAMS
    if unknown:
        name = min(unknown)
        raise UnsupportedParameter(f"generate() has no parameter '{name}'.", param=name)
    fields = {k: v for k, v in params.items() if k in _REQUEST}
    if isinstance(fields.get("stop"), str):
        fields["stop"] = (fields["stop"],)
    if params.get("response_format") is not None:
        if fields.get("grammar") is not None:
            raise InvalidRequest("Give 'grammar' or 'response_format'.", param="grammar")
        fields["grammar"] = structured.response_format(params["response_format"])
    if isinstance(fields.get("grammar"), str):
        fields["grammar"] = structured.lark(fields["grammar"], param="grammar")
    if isinstance(called := fields.get("priority"), str):
        if called.upper() not in Priority.__members__:
            raise InvalidRequest(f"No priority is called {called!r}.", param="priority")
        fields["priority"] = Priority[called.upper()]
    sampling = {k: v for k, v in params.items() if k in _SAMPLING}
    return _checked(
        {
            "request_id": f"req-{uuid.uuid4().hex}",
            "model": model,
            "prompt": to_prompt(prompt, params),
            "sampling": _checked(sampling, SamplingParams),
            **fields,
        },
        GenerateRequest,
    )


def to_embed_request(
    texts: TextsLike, model: str, truncate: int | bool, options: Mapping[str, Any]
) -> EmbedRequest:
    single = isinstance(texts, str) or isinstance(next(iter(texts), None), int)
    listed = [texts] if single else texts
    inputs = [_checked_input(item, i) for i, item in enumerate(listed)]
    fields = {
        "request_id": f"embd-{uuid.uuid4().hex}",
        "model": model,
        "inputs": inputs,
        "param": "texts",
        "single": single,
        "truncate": _kept(truncate),
    }
    return _checked(fields | dict(options), EmbedRequest)


def to_rank_request(model: str, truncate: int | bool, options: Mapping[str, Any]) -> RankRequest:
    fields = {
        "request_id": f"rerank-{uuid.uuid4().hex}",
        "model": model,
        "truncate": _kept(truncate),
    }
    return _checked(fields | dict(options), RankRequest)


def _kept(truncate: int | bool) -> int | None:
    """Tokens that are kept of a longer text; None: it is an error."""
    if isinstance(truncate, bool):
        return 2**31 - 1 if truncate else None
    return truncate


def _checked_input(item: object, at: int) -> TextPrompt | TokenPrompt:
    if isinstance(item, str):
        return TextPrompt(text=item)
    try:
        return TokenPrompt(token_ids=msgspec.convert(item, tuple[int, ...]))
    except msgspec.ValidationError as error:
        raise InvalidRequest(str(error), param=f"texts[{at}]") from None


def _checked(value: object, kind: type[T]) -> T:
    """`value` as a `kind`, types checked. Raises InvalidRequest naming the field."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        problem, _, at = str(error).partition(" - at `$.")
        raise InvalidRequest(problem, param=at.rstrip("`") or None) from None


def to_prompt(prompt: PromptLike, params: Mapping[str, Any]) -> Prompt:
    is_chat = not isinstance(prompt, str) and not isinstance(next(iter(prompt), None), int)
    if not is_chat and (chat_only := sorted(_CHAT & params.keys() - {"response_format"})):
        raise InvalidRequest(f"'{chat_only[0]}' needs chat messages.", param=chat_only[0])
    if isinstance(prompt, str):
        return TextPrompt(text=prompt)
    if prompt and all(isinstance(item, int) for item in prompt):
        return TokenPrompt(token_ids=tuple(prompt))  # type: ignore[arg-type]
    return ChatPrompt(
        messages=tuple(_checked(item, Message) for item in prompt),
        template_kwargs=params.get("template_kwargs", {}),
        reasoning_effort=params.get("reasoning_effort"),
        **msgspec.structs.asdict(tool_use(*(params.get(name) for name in _TOOL_USE))),
    )
