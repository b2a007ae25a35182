"""The body of OpenAI's /v1/responses → a `GenerateRequest`. Every refusal names its field."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from mlx_serving.api import responses_fields as fields
from mlx_serving.api.body import MAX_MESSAGES, convert, read_object, refuse, spelled
from mlx_serving.api.disposition import check
from mlx_serving.content import structured
from mlx_serving.content.tools.definitions import ToolUse, tool_use
from mlx_serving.errors import InvalidRequest
from mlx_serving.types import (
    MAX_LOGPROBS,
    ChatPrompt,
    GenerateRequest,
    Grammar,
    Message,
    SamplingParams,
)
from mlx_serving.unknown import left_out, refuse_others

_MAX_INT = 2**31 - 1
LOGPROBS = "message.output_text.logprobs"

Include = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]


class ResponsesCall(msgspec.Struct, frozen=True, kw_only=True):
    request: GenerateRequest
    stream: bool
    store: bool
    messages: tuple[Message, ...]
    """The conversation up to the answer, without instructions."""
    echo: dict[str, Any]
    """What the response says again of the request."""
    advisory: tuple[str, ...]


class _Body(msgspec.Struct, kw_only=True):
    """None: the client did not say."""

    input: str | Annotated[list[dict[str, Any]], Meta(max_length=MAX_MESSAGES)]
    model: Annotated[str, Meta(min_length=1)] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    max_output_tokens: Annotated[int, Meta(ge=1, le=_MAX_INT)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    include: list[Include] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    metadata: dict[str, str] | None = None
    seed: Annotated[int, Meta(ge=-(2**63))] | None = None


class _Reasoning(msgspec.Struct):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None


SHAPES: Mapping[str, type[msgspec.Struct]] = {
    "/v1/responses": _Body,
    "/v1/responses reasoning": _Reasoning,
}

Recall = Callable[[str], Sequence[Message] | None]
"""The messages of a stored response."""


def parse_response(data: bytes, *, default_model: str, recall: Recall) -> ResponsesCall:
    """Raises InvalidRequest, UnsupportedParameter."""
    raw = read_object(data)
    advisory = check(fields.RESPONSES, raw)
    body = convert(raw, _Body)
    effort = _effort(body.reasoning, advisory)
    check(fields.TEXT, body.text or {}, at="text.")
    if body.seed is not None and body.seed >= 2**64:
        raise InvalidRequest("'seed' must fit in 64 bits.", param="seed")
    wants_logprobs = LOGPROBS in (body.include or ())
    if body.top_logprobs and not wants_logprobs:
        raise InvalidRequest(f"'top_logprobs' needs '{LOGPROBS}' in 'include'.", param="include")
    use = _offered(body)
    messages = (*_recalled(body.previous_response_id, recall), *_input(body.input))
    request = GenerateRequest(
        request_id="resp_" + secrets.token_hex(24),
        model=body.model or default_model,
        prompt=ChatPrompt(
            messages=_with_instructions(body.instructions, messages),
            tools=use.tools,
            tool_choice=use.tool_choice,
            strict_tools=use.strict_tools,
            parallel_tool_calls=use.parallel_tool_calls,
            reasoning_effort=effort,
        ),
        sampling=SamplingParams(
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            logprobs=(body.top_logprobs or 0) if wants_logprobs else None,
        ),
        max_tokens=body.max_output_tokens,
        seed=None if body.seed is None else body.seed % 2**64,
        grammar=_format(body.text),
    )
    return ResponsesCall(
        request=request,
        stream=bool(body.stream),
        store=body.store is not False,
        messages=messages,
        echo=_echo(body, effort),
        advisory=tuple(advisory),
    )


def _echo(body: _Body, effort: str | None) -> dict[str, Any]:
    text = body.text or {}
    return {
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": effort, "summary": None},
        "store": body.store is not False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": text.get("format") or {"type": "text"}},
        "tool_choice": body.tool_choice or "auto",
        "tools": [{"strict": False, **tool} for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
    }


def _effort(raw: dict[str, Any] | None, advisory: list[str]) -> str | None:
    advisory += check(fields.REASONING, raw or {}, at="reasoning.")
    return convert(raw or {}, _Reasoning, at="reasoning").effort


def _format(text: dict[str, Any] | None) -> Grammar | None:
    """The Responses API has the schema beside its type; chat completions one level deeper."""
    given = (text or {}).get("format")
    if given is None:
        return None
    flat = convert(given, dict[str, Any], at="text.format")
    nested = dict(flat)
    if flat.get("type") == "json_schema":
        schema = {k: v for k, v in flat.items() if k != "type"}
        nested = {"type": "json_schema", "json_schema": schema}
    with spelled((".json_schema", "")):
        return structured.response_format(nested, param="text.format")


def _offered(body: _Body) -> ToolUse:
    tools = [
        _tool(tool, f"tools[{i}]")
        for i, tool in enumerate(body.tools or ())
        if not _is_left_out(tool, f"tools[{i}]")
    ]
    choice = body.tool_choice
    if isinstance(choice, dict) and choice.get("type") == "function":
        choice = {"type": "function", "function": {k: v for k, v in choice.items() if k != "type"}}
    with spelled((".function", "")):
        return tool_use(tools, choice, body.parallel_tool_calls)


def _is_left_out(tool: dict[str, Any], at: str) -> bool:
    """A tool that OpenAI's servers would run, on a server that leaves out what it does not know."""
    noted = left_out.get()
    if noted is None or tool.get("type") == "function":
        return False
    noted.append(at)
    return True


def _tool(raw: dict[str, Any], at: str) -> dict[str, Any]:
    """A function as chat completions have it."""
    if raw.get("type") != "function":
        raise refuse(f"{at}.type", "the server runs no tools of its own, only 'function' is")
    check(fields.TOOL, raw, at=at + ".")
    names = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {k: raw[k] for k in names if raw.get(k) is not None}}


def _recalled(response_id: str | None, recall: Recall) -> Sequence[Message]:
    if response_id is None:
        return ()
    messages = recall(response_id)
    if messages is None:
        raise InvalidRequest(
            f"Response '{response_id[:100]}' is not stored (any more).",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    return messages


def _with_instructions(
    instructions: str | None, messages: tuple[Message, ...]
) -> tuple[Message, ...]:
    """System messages at the beginning become one: chat templates know one at most."""
    count = next((i for i, m in enumerate(messages) if m.role != "system"), len(messages))
    texts = [instructions, *(m.content for m in messages[:count])]
    system = "\n\n".join(text for text in texts if text)
    head = (Message(role="system", content=system),) if system else ()
    return head + messages[count:]


# ------------------------------------------------------------------- items

_ITEM_FIELDS = {
    "message": {"type", "role", "content", "id", "status", "phase"},
    "function_call": {"type", "call_id", "name", "arguments", "id", "status", "caller"},
    "function_call_output": {"type", "call_id", "output", "id", "status", "name", "caller"},
    "reasoning": {"type", "id", "summary", "content", "encrypted_content", "status"},
}
_TEXT_PARTS = {
    "input_text": "text",
    "output_text": "text",
    "text": "text",
    "refusal": "refusal",
    "summary_text": "text",
    "reasoning_text": "text",
}
_BESIDE_TEXT = ("type", "annotations", "logprobs", "cache_control", "prompt_cache_breakpoint")
"""What an earlier answer's text came with, and marks for a cache that matches by content anyway."""


class _Item(msgspec.Struct):
    role: Literal["user", "assistant", "system", "developer"]


class _Turn(msgspec.Struct):
    """An assistant's turn that its items are put together to."""

    reasoning: list[str] = []
    texts: list[str] = []
    calls: list[dict[str, Any]] = []

    def message(self) -> Message:
        return Message(
            role="assistant",
            content="\n".join(self.texts) if self.texts or not self.calls else None,
            reasoning_content="\n".join(self.reasoning) or None,
            tool_calls=tuple(self.calls),
        )


def _input(items: str | list[dict[str, Any]]) -> tuple[Message, ...]:
    if isinstance(items, str):
        if not items:
            raise InvalidRequest("'input' is empty.", param="input")
        return (Message(role="user", content=items),)
    if not items:
        raise InvalidRequest("'input' has no items.", param="input")
    messages: list[Message] = []
    turn: _Turn | None = None
    for i, item in enumerate(items):
        at = f"input[{i}]"
        kind = _kind(item, at)
        if kind in ("reasoning", "function_call") or item.get("role") == "assistant":
            turn = turn or _Turn()
            _add_to(turn, kind, item, at)
            continue
        if turn is not None:
            messages.append(turn.message())
            turn = None
        messages.append(_output(item, at) if kind == "function_call_output" else _said(item, at))
    if turn is not None:
        messages.append(turn.message())
    return tuple(messages)


def _kind(item: dict[str, Any], at: str) -> str:
    kind = item.get("type", "message")
    if not isinstance(kind, str):
        raise InvalidRequest(f"'{at}.type' must be a string.", param=f"{at}.type")
    if kind not in _ITEM_FIELDS:
        raise refuse(f"{at}.type", f"items of type '{kind[:64]}' are not read")
    refuse_others(item, _ITEM_FIELDS[kind], f"{at}.")
    return kind


def _add_to(turn: _Turn, kind: str, item: dict[str, Any], at: str) -> None:
    if kind == "reasoning":
        for name in ("content", "summary"):
            if item.get(name):
                turn.reasoning.append(_text(item[name], f"{at}.{name}"))
                break
    elif kind == "function_call":
        function = {"name": _string(item, "name", at), "arguments": _string(item, "arguments", at)}
        call_id = _string(item, "call_id", at)
        turn.calls.append({"id": call_id, "type": "function", "function": function})
    else:
        turn.texts.append(_text(item.get("content"), f"{at}.content"))


def _said(item: dict[str, Any], at: str) -> Message:
    role = convert(item, _Item, at=at).role
    content = _text(item.get("content"), f"{at}.content")
    return Message(role="system" if role == "developer" else role, content=content)


def _output(item: dict[str, Any], at: str) -> Message:
    output = _text(item.get("output"), f"{at}.output")
    return Message(role="tool", content=output, tool_call_id=_string(item, "call_id", at))


def _string(item: dict[str, Any], key: str, at: str) -> str:
    value = item.get(key)
    if not isinstance(value, str):
        raise InvalidRequest(f"'{at}.{key}' must be a string.", param=f"{at}.{key}")
    return value


def _text(content: Any, at: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(f"'{at}' must be a string or parts.", param=at)
    texts: list[str] = []
    for j, part in enumerate(convert(content, list[dict[str, Any]], at=at)):
        kind = part.get("type")
        if not isinstance(kind, str) or kind not in _TEXT_PARTS:
            raise refuse(f"{at}[{j}]", f"parts of type '{str(kind)[:64]}' are not read, only text")
        texts.append(_string(part, _TEXT_PARTS[kind], f"{at}[{j}]"))
        refuse_others(part, (_TEXT_PARTS[kind], *_BESIDE_TEXT), f"{at}[{j}].")
    return "\n".join(texts)
