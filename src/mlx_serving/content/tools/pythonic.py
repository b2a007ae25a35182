"""Calls written as Python: Llama 3.2 and 4 as the whole answer, LFM2 between tags.

[f(a=1, b="x"), g()]

<|tool_call_start|>[f(a=1)]<|tool_call_end|>
"""

from __future__ import annotations

import json
import re

from mlx_serving.content.json_text import LITERALS, MAX_DEPTH, escape
from mlx_serving.content.reading import Emit, Malformed, Reader, Steps
from mlx_serving.content.tools.family import MAX_NAME, Calls, Family, check_name
from mlx_serving.content.tools.xml_call import to_json

_NAME = re.compile(r"[\w.]*")
_WORD = re.compile(r"[-+.\w]*")
_PLAIN = {quote: re.compile(rf"[^{quote}\\]*") for quote in "'\""}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "0": "\0", "\n": ""}
_DIGITS = {"x": 2, "u": 4, "U": 8}
_NUMBER = re.compile(r"[-+]?\.?\d[-+.\w]*")


def _list(calls: Calls, *, known: bool) -> Steps[None]:
    reader = calls.reader
    yield from reader.expect("[")
    while True:
        yield from reader.space()
        yield from _call(calls, known)
        yield from reader.space()
        if not (yield from reader.accept(",")):
            yield from reader.accept("]")
            return


def _call(calls: Calls, known: bool) -> Steps[None]:
    reader = calls.reader
    name = check_name((yield from reader.run(_NAME, MAX_NAME)))
    if known and name not in calls.tools:
        raise Malformed("no such function is offered")
    yield from reader.expect("(")
    yield from reader.space()
    if (yield from reader.accept(")")):
        calls.whole(name, "{}")
        return
    key = yield from _keyword(reader)
    calls.begin(name)
    separator = "{"
    while True:
        calls.arguments(f'{separator}"{escape(key)}": ')
        separator = ", "
        yield from copy_literal(reader, calls.arguments)
        yield from reader.space()
        comma = yield from reader.accept(",")
        yield from reader.space()
        if (yield from reader.accept(")")):
            break
        if not comma:
            raise Malformed("a call has no end")
        key = yield from _keyword(reader)
    calls.arguments("}")
    calls.end()


def _keyword(reader: Reader) -> Steps[str]:
    key = check_name((yield from reader.run(_NAME, MAX_NAME)))
    yield from reader.space()
    yield from reader.expect("=")
    yield from reader.space()
    return key


def copy_literal(reader: Reader, emit: Emit, depth: int = 0) -> Steps[None]:
    """A Python literal as JSON, while it comes."""
    if depth > MAX_DEPTH:
        raise Malformed(f"a literal nested over {MAX_DEPTH} deep")
    first = yield from reader.peek()
    if first in _PLAIN:
        yield from _copy_string(reader, emit, first)
    elif first in ("[", "("):
        yield from _copy_items(reader, emit, first, "])"["[(".index(first)], depth)
    elif first == "{":
        yield from _copy_items(reader, emit, "{", "}", depth)
    else:
        word = yield from reader.run(_WORD, 512)
        literal = _scalar(word)
        emit(literal or word)
        if literal is None:
            raise Malformed("a value is no literal")


def _copy_items(reader: Reader, emit: Emit, opening: str, closing: str, depth: int) -> Steps[None]:
    mapping = opening == "{"
    yield from reader.expect(opening)
    emit("{" if mapping else "[")
    separator = ""
    while True:
        yield from reader.space()
        if (yield from reader.accept(closing)):
            emit("}" if mapping else "]")
            return
        emit(separator)
        separator = ", "
        if mapping:
            quote = yield from reader.peek()
            if quote not in _PLAIN:
                raise Malformed("a key is not a text")
            yield from _copy_string(reader, emit, quote)
            yield from reader.space()
            yield from reader.expect(":")
            yield from reader.space()
            emit(": ")
        yield from copy_literal(reader, emit, depth + 1)
        yield from reader.space()
        if (yield from reader.peek()) != closing:
            yield from reader.expect(",")


def _copy_string(reader: Reader, emit: Emit, quote: str) -> Steps[None]:
    yield from reader.expect(quote)
    emit('"')
    while True:
        following = yield from reader.peek()
        if not following:
            raise Malformed("a text has no end")
        if (yield from reader.accept(quote)):
            emit('"')
            return
        if (yield from reader.accept("\\")):
            emit((yield from _escape_sequence(reader)))
        else:
            emit(escape(reader.take(_PLAIN[quote])))


def _escape_sequence(reader: Reader) -> Steps[str]:
    letter = yield from reader.peek()
    if not letter:
        raise Malformed("a text has no end")
    yield from reader.expect(letter)
    if letter in _DIGITS:
        digits = ""
        for _ in range(_DIGITS[letter]):
            digit = yield from reader.peek()
            if not digit or digit not in "0123456789abcdefABCDEF":
                raise Malformed("an escape is incomplete")
            yield from reader.expect(digit)
            digits += digit
        if int(digits, 16) > 0x10FFFF:
            raise Malformed("an escape is no character")
        # ASCII only, so that half of a surrogate pair stays JSON.
        return json.dumps(chr(int(digits, 16)))[1:-1]
    if letter in _ESCAPES:
        return escape(_ESCAPES[letter])
    return escape(letter if letter in "\\'\"" else "\\" + letter)


def _scalar(word: str) -> str | None:
    if word in LITERALS:
        return LITERALS[word]
    if _NUMBER.fullmatch(word):
        value = to_json(word, frozenset({"number"}))
        if not value.startswith('"'):
            return value
    return None


def _bare(calls: Calls) -> Steps[None]:
    yield from _list(calls, known=True)


def _read(calls: Calls, opener: str) -> Steps[None]:
    yield from calls.reader.space()
    yield from _list(calls, known=False)
    yield from calls.reader.space()
    yield from calls.reader.close(CLOSE[opener])


CLOSE = {"<|python_start|>": "<|python_end|>", "<|tool_call_start|>": "<|tool_call_end|>"}
LLAMA = Family(
    "llama_pythonic",
    opens=("<|python_start|>",),
    read=_read,
    ends=("<|python_end|>",),
    bare=_bare,
)
LFM = Family(
    "lfm_pythonic", opens=("<|tool_call_start|>",), read=_read, ends=("<|tool_call_end|>",)
)
