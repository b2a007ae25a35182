"""JSON copied from a stream while it comes: what is given out so far is always the beginning of a
valid value.

Two habits of models are put right, since clients would fail on them: control characters and unknown
escapes within strings, and Python's True, False and None.
"""

from __future__ import annotations

import json
import re

from mlx_serving.content.reading import Emit, Malformed, Reader, Steps

MAX_DEPTH = 64
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_WORD = re.compile(r"[-+.\w]*")
_HEX = re.compile(r"[0-9a-fA-F]*")
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?", re.ASCII)
_MAX_WORD = 512
LITERALS = {
    "true": "true",
    "false": "false",
    "null": "null",
    "True": "true",
    "False": "false",
    "None": "null",
}


def escape(text: str) -> str:
    """As it stands within a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def copy_value(reader: Reader, emit: Emit, depth: int = 0) -> Steps[None]:
    """One value, white space before it excluded. Raises Malformed at the character at fault."""
    if depth > MAX_DEPTH:
        raise Malformed(f"JSON nested over {MAX_DEPTH} deep")
    match (yield from reader.peek()):
        case "{":
            yield from _copy_items(reader, emit, depth, "{", "}")
        case "[":
            yield from _copy_items(reader, emit, depth, "[", "]")
        case '"':
            yield from copy_string(reader, emit)
        case _:
            yield from copy_scalar(reader, emit)


def _copy_items(reader: Reader, emit: Emit, depth: int, opening: str, closing: str) -> Steps[None]:
    yield from reader.expect(opening)
    emit(opening)
    yield from reader.space()
    if (yield from reader.accept(closing)):
        emit(closing)
        return
    while True:
        if opening == "{":
            yield from copy_string(reader, emit)
            yield from reader.space()
            yield from reader.expect(":")
            yield from reader.space()
            emit(": ")
        yield from copy_value(reader, emit, depth + 1)
        yield from reader.space()
        if (yield from reader.accept(closing)):
            emit(closing)
            return
        yield from reader.expect(",")
        yield from reader.space()
        emit(", ")


def copy_string(reader: Reader, emit: Emit) -> Steps[None]:
    yield from reader.expect('"')
    emit('"')
    while True:
        plain = yield from _plain(reader, emit)
        if plain == '"':
            emit('"')
            return
        if plain == "\\":
            emit((yield from _escape_sequence(reader)))
        elif plain == "":
            raise Malformed("a string has no end")
        else:
            emit(escape(plain))


def _plain(reader: Reader, emit: Emit) -> Steps[str]:
    """Gives out plain characters as they come; reads and returns the first other one."""
    while True:
        following = yield from reader.peek()
        if following == "" or following == '"' or following == "\\" or following < " ":
            if following:
                yield from reader.expect(following)
            return following
        emit(reader.take(_PLAIN))


def _escape_sequence(reader: Reader) -> Steps[str]:
    """What follows a backslash, with it; an escape that JSON does not know stands for itself."""
    letter = yield from reader.peek()
    if not letter:
        raise Malformed("a string has no end")
    yield from reader.expect(letter)
    if letter in '"\\/bfnrt':
        return "\\" + letter
    if letter == "u":
        digits = ""
        while len(digits) < 4 and _HEX.fullmatch((yield from reader.peek()) or "-"):
            digits += yield from reader.peek()
            yield from reader.expect(digits[-1])
        return "\\u" + digits if len(digits) == 4 else "\\\\u" + digits
    return letter if letter == "'" else "\\\\" + escape(letter)


def read_string(reader: Reader) -> Steps[str]:
    """A string's own text."""
    parts: list[str] = []
    yield from copy_string(reader, parts.append)
    text: str = json.loads("".join(parts))
    return text


def read_value(reader: Reader) -> Steps[str]:
    """A value's JSON, whole."""
    parts: list[str] = []
    yield from copy_value(reader, parts.append)
    return "".join(parts)


def copy_scalar(reader: Reader, emit: Emit) -> Steps[None]:
    """A number, true, false or null; another word is given out before Malformed is raised."""
    word = yield from reader.run(_WORD, _MAX_WORD)
    literal = LITERALS.get(word) or (word if _NUMBER.fullmatch(word) else None)
    emit(literal or word)
    if literal is None:
        raise Malformed("a JSON value is missing" if not word else "a value is not JSON")
