"""MiniMax-M2; DeepSeek-V3.2 writes the same under names of its own.

<minimax:tool_call>
<invoke name="f">
<parameter name="a">1</parameter>
</invoke>
</minimax:tool_call>
"""

from __future__ import annotations

import re

from mlx_serving.content.reading import Malformed, Steps, stops
from mlx_serving.content.tools.family import MAX_NAME, Calls, Family, Forced, Read, check_name
from mlx_serving.content.tools.xml_call import Arguments

_ATTRIBUTES = re.compile(r"""\s*["']?(?P<name>[^"'>]+?)["']?(?:\s+string="(?P<string>\w+)")?\s*""")


def reader_of(prefix: str, close: str) -> Read:
    """A reader of `<{prefix}invoke name="f">` and the elements in it."""
    invoke, end_invoke = f"<{prefix}invoke name=", f"</{prefix}invoke>"
    parameter, end_parameter = f"<{prefix}parameter name=", f"</{prefix}parameter>"
    value_ends = stops(end_parameter, end_invoke)

    def read(calls: Calls, _opener: str) -> Steps[None]:
        reader = calls.reader
        yield from reader.space()
        yield from reader.expect(invoke)
        while True:
            yield from call(calls)
            yield from reader.space()
            if not (yield from reader.accept(invoke)):
                break
        yield from reader.close(close)

    def call(calls: Calls) -> Steps[None]:
        reader = calls.reader
        head, _ = yield from reader.capture(stops(">"), MAX_NAME)
        arguments = Arguments(calls, check_name(_attributes(head)[0]))
        yield from reader.space()
        while (yield from reader.accept(parameter)):
            head, _ = yield from reader.capture(stops(">"), MAX_NAME)
            key, string = _attributes(head)
            end = yield from arguments.read(key, value_ends, string=string)
            if end == end_invoke:
                arguments.end()
                return
            yield from reader.space()
        yield from reader.expect(end_invoke)
        arguments.end()

    return read


def _attributes(head: str) -> tuple[str, bool | None]:
    found = _ATTRIBUTES.fullmatch(head)
    if found is None:
        raise Malformed("an element's name is missing")
    string = found["string"]
    return found["name"], None if string is None else string == "true"


def forced_by(prefix: str, open_: str, close: str, attributes: str = "") -> Forced:
    """The same, spelt out."""
    return Forced(
        before=f'<{prefix}invoke name="{{name}}">\n',
        after=f"</{prefix}invoke>\n",
        open=open_ + "\n",
        close=close,
        element=(
            f'<{prefix}parameter name="{{key}}"{attributes}>',
            f"</{prefix}parameter>\n",
        ),
    )


OPEN, CLOSE = "<minimax:tool_call>", "</minimax:tool_call>"
FAMILY = Family(
    "minimax",
    opens=(OPEN,),
    read=reader_of("", CLOSE),
    ends=("</invoke>", CLOSE),
    forced=lambda _: forced_by("", OPEN, CLOSE),
)
