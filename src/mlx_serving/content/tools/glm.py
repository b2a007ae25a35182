"""GLM-4.5 to 4.7.

<tool_call>f
<arg_key>a</arg_key>
<arg_value>1</arg_value>
</tool_call>
"""

from __future__ import annotations

from mlx_serving.content.reading import Steps, stops
from mlx_serving.content.tools.family import MAX_NAME, Calls, Family, Forced, check_name
from mlx_serving.content.tools.xml_call import Arguments

OPEN, CLOSE = "<tool_call>", "</tool_call>"
KEY, END_KEY = "<arg_key>", "</arg_key>"
VALUE, END_VALUE = "<arg_value>", "</arg_value>"
_VALUE_ENDS = stops(END_VALUE)


def read(calls: Calls, _opener: str) -> Steps[None]:
    reader = calls.reader
    name, end = yield from reader.capture(stops(KEY, CLOSE), MAX_NAME)
    arguments = Arguments(calls, check_name(name))
    while end == KEY:
        key, _ = yield from reader.capture(stops(END_KEY), MAX_NAME)
        yield from reader.space()
        yield from reader.expect(VALUE)
        yield from arguments.read(key.strip(), _VALUE_ENDS)
        yield from reader.space()
        if not (yield from reader.accept(KEY)):
            yield from reader.expect(CLOSE)
            break
    arguments.end()


def forced(template: str) -> Forced:
    # 4.7 writes no line breaks.
    line = "" if END_KEY + VALUE in template else "\n"
    return Forced(
        before=f"{OPEN}{{name}}{line}",
        after=CLOSE,
        between=line,
        element=(f"{KEY}{{key}}{END_KEY}{line}{VALUE}", f"{END_VALUE}{line}"),
    )


FAMILY = Family(
    "glm",
    opens=(OPEN,),
    read=read,
    ends=(CLOSE,),
    inner=(KEY, END_KEY, VALUE, END_VALUE),
    forced=forced,
)
