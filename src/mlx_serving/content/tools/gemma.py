"""Gemma 4 and FunctionGemma: keys without quotes, strings between tokens of their own.

<|tool_call>call:f{a:1,b:<|"|>x<|"|>}<tool_call|>

<start_function_call>call:f{a:1,b:<escape>x<escape>}<end_function_call>
"""

from __future__ import annotations

import re

from mlx_serving.content.json_text import MAX_DEPTH, copy_string, escape
from mlx_serving.content.reading import Emit, Malformed, Reader, Steps, stops
from mlx_serving.content.tools.family import MAX_NAME, Calls, Family, check_name
from mlx_serving.content.tools.xml_call import to_json

_KEY = re.compile(r"[^:,{}\[\]<>\s]*")
_WORD = re.compile(r"[^,}\]<]*")


def family(name: str, open_: str, close: str, quote: str) -> Family:
    def read(calls: Calls, _opener: str) -> Steps[None]:
        reader = calls.reader
        yield from reader.space()
        while (yield from reader.accept("call:")):
            yield from reader.space()
            function = yield from reader.run(_KEY, MAX_NAME)
            function = check_name(function)
            if (yield from reader.peek()) != "{":
                raise Malformed("a call has no arguments")
            calls.begin(function)
            yield from _copy_object(reader, calls.arguments, quote, 0)
            calls.end()
            yield from reader.space()
        if not (yield from reader.accept(close)) and (yield from reader.peek()):
            raise Malformed(f"{close!r} is missing")

    return Family(name, opens=(open_,), read=read, ends=(close,), inner=(quote,))


def _copy_value(reader: Reader, emit: Emit, quote: str, depth: int) -> Steps[None]:
    if depth > MAX_DEPTH:
        raise Malformed(f"a value nested over {MAX_DEPTH} deep")
    if (yield from reader.accept(quote)):
        yield from _copy_string(reader, emit, quote)
        return
    match (yield from reader.peek()):
        case "{":
            yield from _copy_object(reader, emit, quote, depth)
        case "[":
            yield from _copy_array(reader, emit, quote, depth)
        case '"':
            yield from copy_string(reader, emit)
        case _:
            word = yield from reader.run(_WORD)
            if not (yield from reader.peek()):
                raise Malformed("a value has no end")
            emit(to_json(word.strip(), frozenset()))


def _copy_string(reader: Reader, emit: Emit, quote: str) -> Steps[None]:
    emit('"')
    if not (yield from reader.until(stops(quote), lambda text: emit(escape(text)))):
        raise Malformed("a text has no end")
    emit('"')


def _copy_object(reader: Reader, emit: Emit, quote: str, depth: int) -> Steps[None]:
    yield from reader.expect("{")
    emit("{")
    separator = ""
    while True:
        yield from reader.space()
        if (yield from reader.accept("}")):
            emit("}")
            return
        emit(separator)
        separator = ", "
        if (yield from reader.accept(quote)):
            yield from _copy_string(reader, emit, quote)
        else:
            emit(f'"{escape((yield from reader.run(_KEY, MAX_NAME)))}"')
        yield from reader.expect(":")
        emit(": ")
        yield from reader.space()
        yield from _copy_value(reader, emit, quote, depth + 1)
        yield from reader.space()
        if (yield from reader.peek()) != "}":
            yield from reader.expect(",")


def _copy_array(reader: Reader, emit: Emit, quote: str, depth: int) -> Steps[None]:
    yield from reader.expect("[")
    emit("[")
    separator = ""
    while True:
        yield from reader.space()
        if (yield from reader.accept("]")):
            emit("]")
            return
        emit(separator)
        separator = ", "
        yield from _copy_value(reader, emit, quote, depth + 1)
        yield from reader.space()
        if (yield from reader.peek()) != "]":
            yield from reader.expect(",")


GEMMA4 = family("gemma4", "<|tool_call>", "<tool_call|>", '<|"|>')
FUNCTION_GEMMA = family(
    "function_gemma", "<start_function_call>", "<end_function_call>", "<escape>"
)
