"""Ollama's wire bodies → `GenerateRequest`s. Every refusal names its field."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from mlx_serving.api import ollama_fields as fields
from mlx_serving.api.access import caller
from mlx_serving.api.body import (
    MAX_MESSAGES,
    convert,
    read_object,
    seed_in_64_bits,
    stop_strings,
)
from mlx_serving.api.disposition import Table, check
from mlx_serving.content.structured import json_schema
from mlx_serving.content.tools.definitions import tool_use
from mlx_serving.errors import Forbidden, InvalidRequest
from mlx_serving.types import (
    MAX_LOGPROBS,
    MAX_PENALTY_WINDOW,
    ChatPrompt,
    GenerateRequest,
    Grammar,
    Message,
    Prompt,
    SamplingParams,
    TextPrompt,
)

_MAX_INT = 2**31 - 1
_DURATION = re.compile(r"[-+]?(\d+(\.\d*)?(ns|us|µs|ms|s|m|h)?)+")
_UNITS_S = {"": 1, "h": 3600, "m": 60, "s": 1, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}

_B = TypeVar("_B", bound="_Body")
Penalty = Annotated[float, Meta(ge=-2, le=2)]


class OllamaCall(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    request: GenerateRequest | None
    """None: nothing to answer; the model is to be loaded, or with a `keep_alive_s` of 0 unloaded."""
    keep_alive_s: float | None = None
    stream: bool
    advisory: tuple[str, ...]


class _Body(msgspec.Struct, kw_only=True):
    """What both routes honour. None: the client did not say."""

    model: Annotated[str, Meta(min_length=1)] | None = None
    stream: bool | None = None
    format: str | dict[str, Any] | None = None
    options: dict[str, Any] | None = None
    keep_alive: float | str | None = None
    think: bool | Literal["low", "medium", "high"] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None


class _ChatBody(_Body, kw_only=True):
    messages: Annotated[list[dict[str, Any]], Meta(max_length=MAX_MESSAGES)] | None = None
    tools: list[dict[str, Any]] | None = None


class _GenerateBody(_Body, kw_only=True):
    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None


class _Options(msgspec.Struct, kw_only=True):
    num_predict: Annotated[int, Meta(ge=-2, le=_MAX_INT)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=_MAX_INT)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    repeat_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    repeat_last_n: Annotated[int, Meta(ge=-1, le=MAX_PENALTY_WINDOW)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None


class _CallFunction(msgspec.Struct, kw_only=True):
    name: str
    arguments: dict[str, Any]
    index: int | None = None


class _Call(msgspec.Struct, kw_only=True):
    function: _CallFunction
    id: str | None = None
    type: Literal["function"] = "function"


class _Message(msgspec.Struct, kw_only=True):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    tool_calls: list[_Call] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


_NO_PENALTIES = _Options()

SHAPES: Mapping[str, type[msgspec.Struct]] = {
    "/api/chat": _ChatBody,
    "/api/generate": _GenerateBody,
    "/api/chat and /api/generate options": _Options,
    "/api/chat messages[]": _Message,
    "/api/chat messages[].tool_calls[]": _Call,
    "/api/chat messages[].tool_calls[].function": _CallFunction,
}


def parse_chat(data: bytes, *, default_model: str) -> OllamaCall:
    """The body of /api/chat. Raises InvalidRequest, UnsupportedParameter."""
    raw = read_object(data)
    body, advisory = _body(raw, fields.CHAT, _ChatBody)
    tools = tool_use(body.tools).tools
    prompt = None
    if body.messages:
        prompt = ChatPrompt(
            messages=_messages(body.messages),
            tools=tools,
            template_kwargs=_think(body),
            thinks=bool(body.think),
        )
    return _call(body, prompt, advisory, default_model)


def parse_generate(data: bytes, *, default_model: str) -> OllamaCall:
    """The body of /api/generate. Raises InvalidRequest, UnsupportedParameter."""
    raw = read_object(data)
    body, advisory = _body(raw, fields.GENERATE, _GenerateBody)
    prompt: Prompt | None = None
    if body.raw:
        for name in ("system", "think"):
            if getattr(body, name):
                raise InvalidRequest(f"'{name}' has no place in a raw prompt.", param=name)
        prompt = TextPrompt(text=body.prompt) if body.prompt else None
    elif body.prompt:
        messages = [Message(role="user", content=body.prompt)]
        if body.system:
            messages.insert(0, Message(role="system", content=body.system))
        prompt = ChatPrompt(
            messages=tuple(messages), template_kwargs=_think(body), thinks=bool(body.think)
        )
    return _call(body, prompt, advisory, default_model)


def _body(raw: dict[str, Any], table: Table, kind: type[_B]) -> tuple[_B, list[str]]:
    advisory = check(table, raw)
    body = convert(raw, kind)
    if body.options is not None:
        advisory += check(fields.OPTIONS, body.options, at="options.")
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest("'top_logprobs' needs 'logprobs': true.", param="top_logprobs")
    return body, advisory


def duration_s(keep_alive: float | str | None) -> float | None:
    """Ollama's `keep_alive` in seconds: a number, or Go's `1h30m`; below 0 is for ever."""
    if keep_alive is None or isinstance(keep_alive, (int, float)):
        return keep_alive
    if not _DURATION.fullmatch(keep_alive):
        raise InvalidRequest(
            f"'keep_alive' is no duration: {keep_alive[:40]!r}.", param="keep_alive"
        )
    sign = -1.0 if keep_alive.startswith("-") else 1.0
    parts = re.findall(r"([\d.]+)(ms|us|µs|ns|[hms]?)", keep_alive)
    return sign * sum(float(number) * _UNITS_S[unit] for number, unit in parts)


def kept_s(keep_alive: float | str | None, advisory: list[str]) -> float | None:
    """`keep_alive` in seconds from whoever may say it; anybody else's is added to `advisory`."""
    seconds = duration_s(keep_alive)
    if seconds is None or caller.get().keeps:
        return seconds
    advisory.append("keep_alive")
    return None


def _call(
    body: _Body, prompt: Prompt | None, advisory: list[str], default_model: str
) -> OllamaCall:
    model = body.model or default_model
    options = convert(body.options or {}, _Options, at="options")
    if prompt is None and duration_s(body.keep_alive) == 0 and not caller.get().keeps:
        raise Forbidden(
            "Unloading a model needs the admin key.", param="keep_alive", code="admin_key_required"
        )
    keep_alive_s = kept_s(body.keep_alive, advisory)
    request = None if prompt is None else _request(body, options, prompt, model, keep_alive_s)
    return OllamaCall(
        model=model,
        request=request,
        keep_alive_s=keep_alive_s,
        stream=body.stream is not False,
        advisory=tuple(advisory),
    )


def _request(
    body: _Body, options: _Options, prompt: Prompt, model: str, keep_alive_s: float | None
) -> GenerateRequest:
    max_tokens = options.num_predict
    if max_tokens == 0:
        raise InvalidRequest(
            "'options.num_predict' must be at least 1, or -1 or -2.", param="options.num_predict"
        )
    stop = [options.stop] if isinstance(options.stop, str) else options.stop or []
    return GenerateRequest(
        request_id="ollama-" + secrets.token_hex(12),
        model=model,
        prompt=prompt,
        sampling=_sampling(options, (body.top_logprobs or 0) if body.logprobs else None),
        max_tokens=max_tokens if max_tokens is not None and max_tokens > 0 else None,
        seed=None if options.seed == -1 else seed_in_64_bits(options.seed, "options.seed"),
        stop=stop_strings(stop, "options.stop"),
        grammar=_grammar(body.format),
        keep_alive_s=keep_alive_s,
    )


def _sampling(options: _Options, logprobs: int | None) -> SamplingParams:
    def given(value: float | None, default: float) -> float:
        return default if value is None else value

    window = 64 if options.repeat_last_n is None else options.repeat_last_n
    penalties = _NO_PENALTIES if window == 0 else options
    return SamplingParams(
        temperature=given(options.temperature, 0.8),
        top_k=40 if options.top_k is None else options.top_k,
        top_p=given(options.top_p, 0.9),
        min_p=given(options.min_p, 0.0),
        repetition_penalty=given(penalties.repeat_penalty, 1.0),
        presence_penalty=given(penalties.presence_penalty, 0.0),
        frequency_penalty=given(penalties.frequency_penalty, 0.0),
        penalty_window=window if window > 0 else None,
        logprobs=logprobs,
    )


def _grammar(wanted: str | dict[str, Any] | None) -> Grammar | None:
    if wanted is None or wanted == "":
        return None
    if isinstance(wanted, dict):
        return json_schema(wanted, param="format")
    if wanted != "json":
        raise InvalidRequest("'format' must be json or a JSON schema.", param="format")
    return Grammar(kind="json_object", param="format")


def _think(body: _Body) -> dict[str, Any]:
    if body.think is None:
        return {}
    if isinstance(body.think, bool):
        return {"enable_thinking": body.think}
    return {"enable_thinking": True, "reasoning_effort": body.think}


def _messages(raws: list[dict[str, Any]]) -> tuple[Message, ...]:
    """The turns; calls without an id get one, and the tools' answers find theirs."""
    messages: list[Message] = []
    unanswered: list[tuple[str, str]] = []
    for i, raw in enumerate(raws):
        at = f"messages[{i}]"
        check(fields.MESSAGE, raw, at=at + ".")
        message = convert(raw, _Message, at=at)
        for j, call in enumerate(raw.get("tool_calls") or ()):
            check(fields.CALL, call, at=f"{at}.tool_calls[{j}].")
            check(fields.CALL_FUNCTION, call["function"], at=f"{at}.tool_calls[{j}].function.")
        if message.tool_calls and message.role != "assistant":
            raise InvalidRequest("Only an assistant's message has calls.", param=at + ".tool_calls")
        if message.content is None and not message.tool_calls:
            raise InvalidRequest(f"'{at}.content' is missing.", param=at + ".content")
        calls = [_earlier_call(c, f"call_{i}_{j}") for j, c in enumerate(message.tool_calls or ())]
        unanswered += [(call["id"], call["function"]["name"]) for call in calls]
        messages.append(
            Message(
                role=message.role,
                content=message.content,
                name=message.tool_name,
                tool_calls=tuple(calls),
                tool_call_id=_answered(message, unanswered) if message.role == "tool" else None,
                reasoning_content=message.thinking,
            )
        )
    return tuple(messages)


def _earlier_call(call: _Call, made_up: str) -> dict[str, Any]:
    arguments = msgspec.json.encode(call.function.arguments).decode()
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id or made_up, "type": "function", "function": function}


def _answered(message: _Message, unanswered: list[tuple[str, str]]) -> str | None:
    for k, (call_id, name) in enumerate(unanswered):
        if message.tool_call_id in (None, call_id) and message.tool_name in (None, name):
            del unanswered[k]
            return call_id
    return message.tool_call_id
