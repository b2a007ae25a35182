"""OpenAI's wire bodies → `GenerateRequest`s. Parsing proves validity; nothing is checked later
but what depends on the model. Every refusal names its field."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from mlx_serving.api import fields, inner_fields
from mlx_serving.api.body import MAX_MESSAGES, seed_in_64_bits, spelled, stop_strings
from mlx_serving.api.body import convert as _convert
from mlx_serving.api.body import read_object as _object
from mlx_serving.api.wishes import parse_priority
from mlx_serving.content import structured
from mlx_serving.content.tools.definitions import tool_use
from mlx_serving.errors import InvalidRequest, UnsupportedParameter
from mlx_serving.types import (
    MAX_LOGPROBS,
    MAX_TIMEOUT_S,
    ChatPrompt,
    GenerateRequest,
    Grammar,
    Message,
    Prompt,
    SamplingParams,
    TextPrompt,
    TokenPrompt,
)

MAX_CHOICES = 16
MAX_PROMPTS = 256
MAX_LOGIT_BIAS = 1024
COMPLETIONS_MAX_TOKENS = 16
"""OpenAI's default on /v1/completions."""

_MAX_INT = 2**31 - 1
_RESERVED_TEMPLATE_KWARGS = frozenset(
    {
        "messages",
        "tools",
        "add_generation_prompt",
        "continue_final_message",
        "chat_template",
    }
)

Penalty = Annotated[float, Meta(ge=-2, le=2)]
TokenId = Annotated[int, Meta(ge=0, le=_MAX_INT)]
MaxTokens = Annotated[int, Meta(ge=-1, le=_MAX_INT)]
Natural = Annotated[int, Meta(ge=0, le=_MAX_INT)]


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """One wire request: a GenerateRequest for each prompt, and how the answer is to be written."""

    id: str
    model: str
    requests: tuple[GenerateRequest, ...]
    stream: bool
    include_usage: bool
    echo: bool
    advisory: tuple[str, ...]


class _StreamOptions(msgspec.Struct, kw_only=True):
    include_usage: bool | None = None


class _Body(msgspec.Struct, kw_only=True):
    """What both routes honour. None: the client did not say."""

    model: Annotated[str, Meta(min_length=1)] | None = None
    adapters: Annotated[str, Meta(min_length=1)] | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=_MAX_INT)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Any] | None = None
    seed: int | None = None
    stop: str | list[Any] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=128)] | None = None
    min_tokens: Natural | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    priority: str | int | None = None
    timeout: Annotated[float, Meta(gt=0, le=MAX_TIMEOUT_S)] | None = None
    cache_salt: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    max_tokens: MaxTokens | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | bool | str | None = None
    guided_regex: str | None = None
    guided_choice: list[Any] | None = None
    guided_grammar: str | None = None
    grammar: str | None = None


class _ChatBody(_Body, kw_only=True):
    messages: Annotated[list[dict[str, Any]], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class _CompletionBody(_Body, kw_only=True):
    prompt: str | list[Any]
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None


class _Function(msgspec.Struct):
    name: str
    arguments: str


class _ToolCall(msgspec.Struct, kw_only=True):
    id: str
    type: Literal["function"] = "function"
    function: _Function
    index: int | None = None


class _Message(msgspec.Struct, kw_only=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Any] | None = None
    name: str | None = None
    tool_calls: list[_ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


SHAPES: Mapping[str, type[msgspec.Struct]] = {
    "/v1/chat/completions": _ChatBody,
    "/v1/completions": _CompletionBody,
    "stream_options": _StreamOptions,
    "messages[]": _Message,
    "messages[].tool_calls[]": _ToolCall,
    "messages[].tool_calls[].function": _Function,
}


def parse_chat(data: bytes, *, default_model: str) -> Call:
    """The body of /v1/chat/completions. Raises InvalidRequest, UnsupportedParameter."""
    return chat_call(_object(data), default_model=default_model)


def chat_call(raw: dict[str, Any], *, default_model: str) -> Call:
    """The same of a body that is read already."""
    advisory = fields.check(fields.CHAT, raw)
    body = _convert(raw, _ChatBody)
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest("'top_logprobs' needs 'logprobs': true.", param="top_logprobs")
    max_tokens = _limit(body.max_tokens, "max_tokens")
    completion_tokens = _limit(body.max_completion_tokens, "max_completion_tokens")
    if completion_tokens is not None:
        if max_tokens not in (None, completion_tokens):
            raise InvalidRequest(
                "'max_tokens' and 'max_completion_tokens' disagree; send one.", param="max_tokens"
            )
        max_tokens = completion_tokens
    return _call(
        body,
        advisory,
        prompts=[_chat_prompt(body)],
        call_id="chatcmpl-" + secrets.token_hex(12),
        model=_model(body, default_model),
        max_tokens=max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        echo=False,
        user=raw.get("user"),
    )


def parse_completion(data: bytes, *, default_model: str, default_max_tokens: int | None) -> Call:
    """The body of /v1/completions. Raises InvalidRequest, UnsupportedParameter."""
    raw = _object(data)
    advisory = fields.check(fields.COMPLETIONS, raw)
    body = _convert(raw, _CompletionBody)
    if body.echo and body.logprobs is not None:
        raise UnsupportedParameter(
            "'echo' with 'logprobs' needs the prompt's log-probabilities, which are not computed.",
            param="echo",
        )
    add_special = True if body.add_special_tokens is None else body.add_special_tokens
    fallback = COMPLETIONS_MAX_TOKENS if default_max_tokens is None else default_max_tokens
    max_tokens = _limit(body.max_tokens, "max_tokens")
    return _call(
        body,
        advisory,
        prompts=_text_prompts(body.prompt, add_special),
        call_id="cmpl-" + secrets.token_hex(12),
        model=_model(body, default_model),
        max_tokens=fallback if max_tokens is None else max_tokens,
        logprobs=body.logprobs,
        echo=bool(body.echo),
        user=raw.get("user"),
    )


def _model(body: _Body, default: str) -> str:
    model = body.model or default
    return model if body.adapters is None else f"{model}+{body.adapters}"


def _limit(tokens: int | None, name: str) -> int | None:
    """-1 is how other servers say: what the context leaves."""
    if tokens == 0:
        raise InvalidRequest(f"'{name}' must be at least 1, or -1.", param=name)
    return _MAX_INT if tokens == -1 else tokens


def _call(
    body: _Body,
    advisory: list[str],
    *,
    prompts: list[Prompt],
    call_id: str,
    model: str,
    max_tokens: int | None,
    logprobs: int | None,
    echo: bool,
    user: object,
) -> Call:
    include_usage, more_advisory = _stream_options(body)
    if body.min_tokens and max_tokens is not None and body.min_tokens > max_tokens:
        raise InvalidRequest(
            f"'min_tokens' ({body.min_tokens}) is over the {max_tokens} tokens allowed.",
            param="min_tokens",
        )
    shared: dict[str, Any] = {
        "model": model,
        "sampling": _sampling(body, logprobs),
        "max_tokens": max_tokens,
        "seed": seed_in_64_bits(body.seed),
        "n": body.n or 1,
        "stop": _stop(body.stop),
        "include_stop_str": bool(body.include_stop_str_in_output),
        "priority": parse_priority(body.priority),
        "timeout_s": body.timeout,
        "cache_salt": body.cache_salt,
        "grammar": _grammar(body),
        "session": user if isinstance(user, str) else None,
    }
    ids = [call_id] if len(prompts) == 1 else [f"{call_id}-{i}" for i in range(len(prompts))]
    return Call(
        id=call_id,
        model=model,
        requests=tuple(
            GenerateRequest(request_id=request_id, prompt=prompt, **shared)
            for request_id, prompt in zip(ids, prompts, strict=True)
        ),
        stream=bool(body.stream),
        include_usage=include_usage,
        echo=echo,
        advisory=(*advisory, *more_advisory),
    )


def _grammar(body: _Body) -> Grammar | None:
    """From the one field that says what the output must look like."""
    given = [name for name in _GRAMMARS if getattr(body, name) is not None]
    found = [g for n in given if (g := _GRAMMARS[n](getattr(body, n), param=n)) is not None]
    if len(found) > 1:
        raise InvalidRequest(
            f"'{given[-1]}' and '{given[0]}' each describe the output; send one.", param=given[-1]
        )
    return found[0] if found else None


_GRAMMARS: Mapping[str, Callable[..., Grammar | None]] = {
    "response_format": structured.response_format,
    "structured_outputs": structured.structured_outputs,
    "guided_json": structured.json_schema,
    "guided_regex": structured.regex,
    "guided_choice": structured.choice,
    "guided_grammar": structured.lark,
    "grammar": structured.gbnf,
}


def _sampling(body: _Body, logprobs: int | None) -> SamplingParams:
    given = {name: value for name in _SAMPLING_FIELDS if (value := getattr(body, name)) is not None}
    return SamplingParams(
        **given,
        top_k=max(body.top_k or 0, 0),
        logit_bias=_logit_bias(body.logit_bias),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        logprobs=logprobs,
    )


_SAMPLING_FIELDS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "min_tokens",
    "ignore_eos",
)


def _stream_options(body: _Body) -> tuple[bool, list[str]]:
    if body.stream_options is None:
        return False, []
    if not body.stream:
        raise InvalidRequest("'stream_options' needs 'stream': true.", param="stream_options")
    advisory = fields.check(fields.STREAM_OPTIONS, body.stream_options, at="stream_options.")
    options = _convert(body.stream_options, _StreamOptions, at="stream_options")
    return bool(options.include_usage), advisory


def _logit_bias(entries: dict[str, Any] | None) -> dict[int, float]:
    if not entries:
        return {}
    if len(entries) > MAX_LOGIT_BIAS:
        raise InvalidRequest(
            f"'logit_bias' has {len(entries)} entries; at most {MAX_LOGIT_BIAS}.",
            param="logit_bias",
        )
    biases: dict[int, float] = {}
    for key, bias in entries.items():
        if not re.fullmatch(r"[0-9]{1,10}", key) or int(key) > _MAX_INT:
            raise InvalidRequest("'logit_bias' maps token ids to biases.", param="logit_bias")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise InvalidRequest(
                f"'logit_bias.{key}' must be a number from -100 to 100.", param=f"logit_bias.{key}"
            )
        biases[int(key)] = float(bias)
    return biases


def _stop(stop: str | list[Any] | None) -> tuple[str, ...]:
    if isinstance(stop, str):
        with spelled(("stop[0]", "stop")):
            return stop_strings([stop], "stop")
    return stop_strings(_convert(stop or [], list[str], at="stop"), "stop")


def _chat_prompt(body: _ChatBody) -> ChatPrompt:
    continued = bool(body.continue_final_message)
    generation_prompt = body.add_generation_prompt
    if generation_prompt is None:
        generation_prompt = not continued
    if generation_prompt and continued:
        raise InvalidRequest(
            "'continue_final_message' leaves no place for a generation prompt; "
            "'add_generation_prompt' must be false with it.",
            param="add_generation_prompt",
        )
    kwargs = body.chat_template_kwargs or {}
    if reserved := _RESERVED_TEMPLATE_KWARGS.intersection(kwargs):
        name = min(reserved)
        raise InvalidRequest(
            f"'chat_template_kwargs.{name}' has a field of its own or is the server's to set.",
            param=f"chat_template_kwargs.{name}",
        )
    messages = tuple(_message(raw, f"messages[{i}]") for i, raw in enumerate(body.messages))
    if continued and not messages[-1].content:
        raise InvalidRequest(
            "'continue_final_message' needs text in the last message.",
            param=f"messages[{len(messages) - 1}].content",
        )
    return ChatPrompt(
        messages=messages,
        template_kwargs=kwargs,
        add_generation_prompt=generation_prompt,
        continue_final_message=continued,
        reasoning_effort=body.reasoning_effort,
        **msgspec.structs.asdict(tool_use(body.tools, body.tool_choice, body.parallel_tool_calls)),
    )


def _message(raw: dict[str, Any], at: str) -> Message:
    fields.check(fields.MESSAGE, raw, at=at + ".")
    message = _convert(raw, _Message, at=at)
    for j, call in enumerate(raw.get("tool_calls") or ()):
        where = f"{at}.tool_calls[{j}]."
        fields.check(inner_fields.CALL, call, at=where)
        fields.check(inner_fields.CALL_FUNCTION, call["function"], at=where + "function.")
    role = "system" if message.role == "developer" else message.role
    content = message.content
    if isinstance(content, list):
        # A tool may have nothing to say.
        content = "" if role == "tool" and not content else _join_parts(content, at + ".content")
    if content is None and role == "assistant" and not message.tool_calls:
        content = ""  # it only thought, or was cut before it spoke
    if content is None and role != "assistant":
        raise InvalidRequest(f"'{at}.content' is missing.", param=at + ".content")
    if message.tool_calls and role != "assistant":
        raise InvalidRequest("Only an assistant's message has calls.", param=at + ".tool_calls")
    if role == "tool" and message.tool_call_id is None:
        raise InvalidRequest(
            f"'{at}.tool_call_id' is missing: which call does it answer?",
            param=at + ".tool_call_id",
        )
    return Message(
        role=role,
        content=content,
        name=message.name,
        tool_calls=tuple(_tool_call(call) for call in message.tool_calls or ()),
        tool_call_id=message.tool_call_id,
        reasoning_content=message.reasoning_content,
    )


def _tool_call(call: _ToolCall) -> Mapping[str, Any]:
    function = {"name": call.function.name, "arguments": call.function.arguments}
    return {"id": call.id, "type": call.type, "function": function}


def _join_parts(parts: list[Any], at: str) -> str:
    if not parts:
        raise InvalidRequest(f"'{at}' has no parts.", param=at)
    texts: list[str] = []
    for j, part in enumerate(parts):
        if not isinstance(part, dict):
            raise InvalidRequest(f"'{at}[{j}]' must be an object.", param=f"{at}[{j}]")
        if part.get("type") != "text":
            kind = str(part.get("type"))[:64]
            raise UnsupportedParameter(
                f"'{at}[{j}]' is of type '{kind}'; only text is supported.", param=f"{at}[{j}]"
            )
        if not isinstance(part.get("text"), str):
            raise InvalidRequest(f"'{at}[{j}].text' must be a string.", param=f"{at}[{j}].text")
        fields.check(inner_fields.CONTENT, part, at=f"{at}[{j}].")
        texts.append(part["text"])
    return "\n".join(texts)


def _text_prompts(prompt: str | list[Any], add_special_tokens: bool) -> list[Prompt]:
    """One prompt or several: text, or token ids."""
    if isinstance(prompt, str):
        return [_text_prompt(prompt, "prompt", add_special_tokens)]
    if not prompt:
        raise InvalidRequest("'prompt' is empty.", param="prompt")
    first = prompt[0]
    if isinstance(first, int):
        return [_token_prompt(prompt, "prompt")]
    if len(prompt) > MAX_PROMPTS:
        raise InvalidRequest(f"'prompt' has over {MAX_PROMPTS} prompts.", param="prompt")
    if isinstance(first, str):
        return [
            _text_prompt(text, f"prompt[{i}]", add_special_tokens)
            for i, text in enumerate(_convert(prompt, list[str], at="prompt"))
        ]
    return [_token_prompt(ids, f"prompt[{i}]") for i, ids in enumerate(prompt)]


def _text_prompt(text: str, at: str, add_special_tokens: bool) -> TextPrompt:
    if not text:
        raise InvalidRequest(f"'{at}' is empty.", param=at)
    return TextPrompt(text=text, add_special_tokens=add_special_tokens)


def _token_prompt(ids: Any, at: str) -> TokenPrompt:
    token_ids = _convert(ids, list[TokenId], at=at)
    if not token_ids:
        raise InvalidRequest(f"'{at}' is empty.", param=at)
    return TokenPrompt(token_ids=tuple(token_ids))
