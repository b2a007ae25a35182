"""Calls whose arguments are elements of their own: what the families that write so share.

Values are plain text, so what they are is read from the function's schema: a declared string
streams as it is, anything else is held until it is whole and becomes the JSON that fits.
"""

from __future__ import annotations

import ast
import json
import math

from mlx_serving.content.json_text import LITERALS, escape
from mlx_serving.content.reading import Emit, Malformed, Steps, Stops
from mlx_serving.content.tools.family import Calls

MAX_LITERAL = 100_000


class Arguments:
    """One call's arguments, written as a JSON object while their elements come."""

    def __init__(self, calls: Calls, function: str) -> None:
        self._calls = calls
        self._function = function
        self._separator = "{"
        calls.begin(function)

    def read(self, key: str, ends: Stops, *, string: bool | None = None) -> Steps[str]:
        """One value up to one of `ends`, which is returned. `string` says what the markup says.
        Raises Malformed when there is no end."""
        emit = self._calls.arguments
        types = self._calls.tools.types(self._function, key)
        emit(f'{self._separator}"{escape(key)}": ')
        self._separator = ", "
        if string or (string is None and types == {"string"}):
            emit('"')
            end = yield from copy_text(self._calls, ends, lambda text: emit(escape(text)))
            emit('"')
        else:
            parts: list[str] = []
            end = yield from copy_text(self._calls, ends, parts.append)
            emit(to_json("".join(parts), frozenset() if string is False else types))
        return end

    def end(self) -> None:
        self._calls.arguments("{}" if self._separator == "{" else "}")
        self._calls.end()


def copy_text(calls: Calls, ends: Stops, emit: Emit) -> Steps[str]:
    """The text up to one of `ends`, without the line breaks that set it apart from its tags."""
    held, fresh = "", True

    def trim(text: str) -> None:
        nonlocal held, fresh
        if fresh:
            fresh = False
            text = text.removeprefix("\n")
        text = held + text
        held = "\n" if text.endswith("\n") else ""
        if text := text.removesuffix("\n"):
            emit(text)

    end = yield from calls.reader.until(ends, trim)
    if not end:
        raise Malformed("an argument has no end")
    return end


def to_json(text: str, types: frozenset[str]) -> str:
    """The JSON of a value that was written as plain text; `types` empty: not known."""
    value = text.strip()
    if "string" in types:
        return value if _of_type(value, types - {"string"}) else _string(text)
    if value in LITERALS:
        return LITERALS[value]
    if _is_json(value):
        return value
    if not types and value[:1] not in ("{", "["):
        return _string(text)
    return _python(value) or _string(text)


def _string(text: str) -> str:
    return f'"{escape(text)}"'


def _is_json(text: str) -> bool:
    return _load(text) is not _NONE


_NONE = object()


def _load(text: str) -> object:
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _NONE
    return _NONE if isinstance(value, float) and math.isinf(value) else value


def _refuse(constant: str) -> object:
    raise ValueError(constant)


def _of_type(text: str, types: frozenset[str]) -> bool:
    value = _load(text)
    match value:
        case bool():
            return "boolean" in types
        case int():
            return bool(types & {"integer", "number"})
        case float():
            return "number" in types
        case None:
            return "null" in types
        case dict():
            return "object" in types
        case list():
            return "array" in types
        case _:
            return False


def _python(text: str) -> str | None:
    """The JSON of a Python literal, as some models write lists and objects."""
    if len(text) > MAX_LITERAL:
        return None
    try:
        return json.dumps(ast.literal_eval(text), allow_nan=False)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
