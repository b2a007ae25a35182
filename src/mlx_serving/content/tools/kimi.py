"""Kimi K2. The call's id is the model's own, since it wants to see it again.

<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"a": 1}
<|tool_call_end|><|tool_calls_section_end|>
"""

from __future__ import annotations

import re

from mlx_serving.content.reading import Steps, stops
from mlx_serving.content.tools.family import MAX_NAME, Calls, Family, Forced, check_name

SECTION, END_SECTION = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL, END_CALL = "<|tool_call_begin|>", "<|tool_call_end|>"
ARGUMENTS = "<|tool_call_argument_begin|>"
_ID = re.compile(r"(?:functions\.)?(?P<name>.+?)(?::\d+)?")


def read(calls: Calls, opener: str) -> Steps[None]:
    reader = calls.reader
    if opener == SECTION:
        yield from reader.space()
        yield from reader.expect(CALL)
    while True:
        call_id, _ = yield from reader.capture(stops(ARGUMENTS), MAX_NAME)
        call_id = check_name(call_id)
        found = _ID.fullmatch(call_id)
        assert found is not None, "a name is not empty"
        yield from reader.space()
        numbered = ":" in call_id
        yield from calls.json_arguments(found["name"], call_id if numbered else None)
        yield from reader.space()
        yield from reader.close(END_CALL)
        yield from reader.space()
        if not (yield from reader.accept(CALL)):
            break
    yield from reader.close(END_SECTION)


def forced(_template: str) -> Forced:
    return Forced(
        before=f"{CALL}functions.{{name}}:0{ARGUMENTS}",
        after=END_CALL,
        open=SECTION,
        close=END_SECTION,
    )


FAMILY = Family(
    "kimi",
    opens=(SECTION, CALL),
    read=read,
    ends=(END_CALL, END_SECTION),
    inner=(ARGUMENTS,),
    forced=forced,
)
