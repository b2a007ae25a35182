"""Llama 3: JSON, after `<|python_tag|>` or as the whole answer; several with semicolons between.

{"name": "f", "parameters": {"a": 1}}
"""

from __future__ import annotations

from mlx_serving.content.reading import Malformed, Steps
from mlx_serving.content.tools.family import Calls, Family, Forced
from mlx_serving.content.tools.json_call import read_call, read_calls

TAG = "<|python_tag|>"


def read(calls: Calls, _opener: str) -> Steps[None]:
    yield from calls.reader.space()
    yield from _several(calls, known=False)


def bare(calls: Calls) -> Steps[None]:
    if (yield from calls.reader.peek()) not in ("{", "["):
        raise Malformed("the answer is not JSON")
    yield from _several(calls, known=True)


def _several(calls: Calls, *, known: bool) -> Steps[None]:
    yield from read_calls(calls, known=known)
    while True:
        yield from calls.reader.space()
        if not (yield from calls.reader.accept(";")):
            return
        yield from calls.reader.space()
        yield from read_call(calls, known=known)


def forced(_template: str) -> Forced:
    return Forced(before='{"name": "{name}", "parameters": ', after="}", between="; ")


FAMILY = Family("llama3_json", opens=(TAG,), read=read, bare=bare, forced=forced)
