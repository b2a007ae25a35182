"""A call as one JSON object, the way several families write it.

`{"name": "f", "arguments": {...}}`, with "parameters" for "arguments", "function" for "name", keys in
any order, or the whole under "function".
"""

from __future__ import annotations

from mlx_serving.content.json_text import copy_value, read_string, read_value
from mlx_serving.content.reading import Malformed, Steps
from mlx_serving.content.tools.family import Calls, check_name, held_arguments

_ARGUMENTS = ("arguments", "parameters")


def read_call(calls: Calls, *, known: bool = False, depth: int = 0) -> Steps[None]:
    """From the opening brace to the closing one, or to where that is missing.

    `known`: only a call with arguments of a function that is offered. Raises Malformed.
    """
    reader = calls.reader
    name, arguments, done = "", "", False
    yield from reader.expect("{")
    while True:
        yield from reader.space()
        if (yield from reader.accept("}")):
            break
        key = yield from read_string(reader)
        yield from reader.space()
        yield from reader.expect(":")
        yield from reader.space()
        first = yield from reader.peek()
        if key in ("name", "function") and first == '"' and not done:
            name = check_name((yield from read_string(reader)))
            if known and name not in calls.tools:
                raise Malformed("no such function is offered")
        elif key == "function" and first == "{" and depth == 0 and not done:
            yield from read_call(calls, known=known, depth=1)
            done = True
        elif key in _ARGUMENTS and name and not done:
            yield from calls.json_arguments(name)
            done = True
        elif key in _ARGUMENTS and not done:
            arguments = yield from _read_arguments(calls)
        elif known and key != "type" and not done:
            raise Malformed("a call has no such key")
        else:
            yield from copy_value(reader, len)
        yield from reader.space()
        if not (yield from reader.accept(",")):
            yield from reader.accept("}")
            break
    if not done:
        if not name or (known and not arguments):
            raise Malformed("a call has no name" if not name else "a call has no arguments")
        calls.whole(name, arguments or "{}")


def read_calls(calls: Calls, *, known: bool = False) -> Steps[None]:
    """One call, or an array of them. Raises Malformed."""
    reader = calls.reader
    if not (yield from reader.accept("[")):
        yield from read_call(calls, known=known)
        return
    while True:
        yield from reader.space()
        yield from read_call(calls, known=known)
        yield from reader.space()
        if not (yield from reader.accept(",")):
            yield from reader.accept("]")
            return


def _read_arguments(calls: Calls) -> Steps[str]:
    if (yield from calls.reader.peek()) == "{":
        return (yield from read_value(calls.reader))
    return (yield from held_arguments(calls.reader))
