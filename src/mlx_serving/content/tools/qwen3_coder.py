"""Qwen3-Coder and its successors.

    <tool_call>
    <function=f>
    <parameter=a>
    1
    </parameter>
    </function>
    </tool_call>

The outer tag is forgotten now and then.
"""

from __future__ import annotations

from mlx_serving.content.reading import Steps, stops
from mlx_serving.content.tools.family import MAX_NAME, Calls, Family, Forced, check_name
from mlx_serving.content.tools.xml_call import Arguments

OPEN, CLOSE = "<tool_call>", "</tool_call>"
FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"
_VALUE_ENDS = stops(END_PARAMETER, PARAMETER, END_FUNCTION)


def read(calls: Calls, opener: str) -> Steps[None]:
    reader = calls.reader
    if opener == OPEN:
        yield from reader.space()
        yield from reader.expect(FUNCTION)
    while True:
        yield from _function(calls)
        yield from reader.space()
        if not (yield from reader.accept(FUNCTION)):
            break
    yield from reader.close(CLOSE)


def _function(calls: Calls) -> Steps[None]:
    reader = calls.reader
    name, _ = yield from reader.capture(stops(">"), MAX_NAME)
    arguments = Arguments(calls, check_name(name))
    yield from reader.space()
    following = yield from reader.accept(PARAMETER)
    while following:
        key, _ = yield from reader.capture(stops(">"), MAX_NAME)
        end = yield from arguments.read(key.strip(), _VALUE_ENDS)
        if end == END_FUNCTION:
            arguments.end()
            return
        yield from reader.space()
        following = end == PARAMETER or (yield from reader.accept(PARAMETER))
    yield from reader.expect(END_FUNCTION)
    arguments.end()


def forced(_template: str) -> Forced:
    return Forced(
        before=f"{OPEN}\n{FUNCTION}{{name}}>\n",
        after=f"{END_FUNCTION}\n{CLOSE}",
        between="\n",
        element=(f"{PARAMETER}{{key}}>\n", f"\n{END_PARAMETER}\n"),
    )


FAMILY = Family(
    "qwen3_coder",
    opens=(OPEN, FUNCTION),
    read=read,
    ends=(END_FUNCTION, CLOSE),
    inner=(PARAMETER, END_PARAMETER),
    forced=forced,
)
