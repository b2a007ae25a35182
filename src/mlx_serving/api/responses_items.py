"""The items of /v1/responses' `input` → the messages that a chat template sees."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from mlx_serving.api import responses_fields as fields
from mlx_serving.api.body import convert, refuse, string_of
from mlx_serving.api.disposition import check
from mlx_serving.api.responses_tools import full_name
from mlx_serving.errors import InvalidRequest
from mlx_serving.types import Message

_TEXT_KINDS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")


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


def messages_of(items: str | list[dict[str, Any]]) -> tuple[Message, ...]:
    """Raises InvalidRequest or UnsupportedParameter, naming the item's field."""
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
    if kind not in fields.ITEMS:
        raise refuse(f"{at}.type", f"items of type '{kind[:64]}' are not read")
    check(fields.ITEMS[kind], item, at=f"{at}.")
    return kind


def _add_to(turn: _Turn, kind: str, item: dict[str, Any], at: str) -> None:
    if kind == "reasoning":
        for name in ("content", "summary"):
            if item.get(name):
                turn.reasoning.append(_text(item[name], f"{at}.{name}"))
                break
    elif kind == "function_call":
        space = string_of(item, "namespace", at) if item.get("namespace") is not None else None
        name = full_name(space, string_of(item, "name", at))
        function = {"name": name, "arguments": string_of(item, "arguments", at)}
        call_id = string_of(item, "call_id", at)
        turn.calls.append({"id": call_id, "type": "function", "function": function})
    else:
        turn.texts.append(_text(item.get("content"), f"{at}.content"))


def _said(item: dict[str, Any], at: str) -> Message:
    role = convert(item, _Item, at=at).role
    content = _text(item.get("content"), f"{at}.content")
    return Message(role="system" if role == "developer" else role, content=content)


def _output(item: dict[str, Any], at: str) -> Message:
    output = _text(item.get("output"), f"{at}.output")
    return Message(role="tool", content=output, tool_call_id=string_of(item, "call_id", at))


def _text(content: Any, at: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(f"'{at}' must be a string or parts.", param=at)
    texts: list[str] = []
    for j, part in enumerate(convert(content, list[dict[str, Any]], at=at)):
        kind = part.get("type")
        table = fields.REFUSAL if kind == "refusal" else fields.TEXT_PART
        if kind != "refusal" and kind not in _TEXT_KINDS:
            raise refuse(f"{at}[{j}]", f"parts of type '{str(kind)[:64]}' are not read, only text")
        texts.append(string_of(part, "refusal" if kind == "refusal" else "text", f"{at}[{j}]"))
        check(table, part, at=f"{at}[{j}].")
    return "\n".join(texts)
