"""DeepSeek V3 and R1, V3.1, and V3.2.

<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f
```json
{"a": 1}
```<｜tool▁call▁end｜><｜tool▁calls▁end｜>

<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜><｜tool▁calls▁end｜>

<｜DSML｜function_calls>
<｜DSML｜invoke name="f">
<｜DSML｜parameter name="a" string="false">1</｜DSML｜parameter>
</｜DSML｜invoke>
</｜DSML｜function_calls>
"""

from __future__ import annotations

from mlx_serving.content.reading import Steps, stops
from mlx_serving.content.tools.family import MAX_NAME, Calls, Family, Forced, check_name
from mlx_serving.content.tools.minimax import forced_by, reader_of

CALLS, END_CALLS = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, END_CALL = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"
FENCE = "```json"


def read(calls: Calls, opener: str) -> Steps[None]:
    reader = calls.reader
    if opener == CALLS:
        yield from reader.space()
        yield from reader.expect(CALL)
    while True:
        yield from _call(calls)
        yield from reader.space()
        if not (yield from reader.accept(CALL)):
            break
    yield from reader.close(END_CALLS)


def _call(calls: Calls) -> Steps[None]:
    reader = calls.reader
    name, _ = yield from reader.capture(stops(SEPARATOR), MAX_NAME)
    yield from reader.space()
    fenced = name.strip() == "function" and (yield from reader.peek()) != "{"
    if fenced:
        name, _ = yield from reader.capture(stops("\n"), MAX_NAME)
        yield from reader.space()
        yield from reader.accept(FENCE)
        yield from reader.space()
    yield from calls.json_arguments(check_name(name))
    yield from reader.space()
    yield from reader.accept("```")
    yield from reader.space()
    yield from reader.close(END_CALL)


def forced(template: str) -> Forced:
    if FENCE in template:
        before, after = f"{CALL}function{SEPARATOR}{{name}}\n{FENCE}\n", f"\n```{END_CALL}"
        return Forced(before, after, open=CALLS, between="\n", close=END_CALLS)
    return Forced(f"{CALL}{{name}}{SEPARATOR}", END_CALL, open=CALLS, close=END_CALLS)


FAMILY = Family(
    "deepseek",
    opens=(CALLS, CALL),
    read=read,
    ends=(END_CALL, END_CALLS),
    inner=(SEPARATOR,),
    forced=forced,
)

_DSML, _END_DSML = "<｜DSML｜function_calls>", "</｜DSML｜function_calls>"
DSML = Family(
    "deepseek_v32",
    opens=(_DSML,),
    read=reader_of("｜DSML｜", _END_DSML),
    ends=("</｜DSML｜invoke>", _END_DSML),
    inner=("｜DSML｜",),
    forced=lambda _: forced_by("｜DSML｜", _DSML, _END_DSML, ' string="{string}"'),
)
