"""Mistral and Devstral, before and since their eleventh tokenizer.

[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}]

[TOOL_CALLS]f[ARGS]{"a": 1}
"""

from __future__ import annotations

import secrets
import string

from mlx_serving.content.reading import Steps, stops
from mlx_serving.content.tools.family import MAX_NAME, Calls, Family, Forced, check_name
from mlx_serving.content.tools.json_call import read_calls

OPEN, ARGUMENTS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_LETTERS = string.ascii_letters + string.digits


def new_id() -> str:
    """Mistral's templates take nine letters or digits, and no other id."""
    return "".join(secrets.choice(_LETTERS) for _ in range(9))


def read(calls: Calls, _opener: str) -> Steps[None]:
    reader = calls.reader
    yield from reader.space()
    if (yield from reader.peek()) in ("[", "{"):
        yield from read_calls(calls)
        return
    while True:
        name, end = yield from reader.capture(stops(ARGUMENTS, CALL_ID), MAX_NAME)
        if end == CALL_ID:
            yield from reader.capture(stops(ARGUMENTS), MAX_NAME)
        yield from reader.space()
        yield from calls.json_arguments(check_name(name))
        yield from reader.space()
        if not (yield from reader.accept(OPEN)):
            return
        yield from reader.space()


def forced(template: str) -> Forced:
    if ARGUMENTS in template:
        return Forced(before=f"{OPEN}{{name}}{ARGUMENTS}", after="")
    return Forced(
        before='{"name": "{name}", "arguments": ',
        after="}",
        open=OPEN + "[",
        between=", ",
        close="]",
    )


FAMILY = Family("mistral", opens=(OPEN,), read=read, inner=(ARGUMENTS, CALL_ID), forced=forced)
