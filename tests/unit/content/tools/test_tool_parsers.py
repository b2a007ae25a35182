"""What each family writes, and what is made of it however it is cut."""

from __future__ import annotations

import itertools
import json
import logging
from dataclasses import dataclass, field
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_serving.config import ReasoningParser, ToolParser
from mlx_serving.content.output import Format, OutputParser, choose_format
from mlx_serving.content.reasoning import TAGS, reasoning_in
from mlx_serving.content.tools.select import FAMILIES, family_in

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "tags": {"type": "array"},
                "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            },
        },
    },
}
NOW: dict[str, Any] = {"type": "function", "function": {"name": "now", "parameters": {}}}
TOOLS = [WEATHER, NOW]


@dataclass
class Message:
    content: str = ""
    reasoning: str = ""
    calls: list[list[str]] = field(default_factory=list)
    """[id, name, arguments]"""

    @property
    def called(self) -> list[tuple[str, Any]]:
        return [(name, json.loads(arguments)) for _, name, arguments in self.calls]


def parse(form: Format, chunks: list[str], tools: Any = TOOLS, **options: Any) -> Message:
    ids = itertools.count()
    parser = OutputParser(form, tools, new_id=lambda: f"id{next(ids)}", **options)
    message = Message()
    for parsed in (*map(parser.push, chunks), parser.finish()):
        message.content += parsed.content
        message.reasoning += parsed.reasoning
        for delta in parsed.tool_calls:
            if delta.id is not None:
                assert delta.index == len(message.calls) and delta.name
                message.calls.append([delta.id, delta.name, ""])
            message.calls[delta.index][2] += delta.arguments
    assert parser.calls == len(message.calls)
    return message


def cut(text: str, places: list[int]) -> list[str]:
    marks = sorted({0, len(text), *(p % (len(text) + 1) for p in places)})
    return [text[a:b] for a, b in itertools.pairwise(marks)]


PARIS = ("get_weather", {"city": "Paris", "days": 2})
ODD = ("get_weather", {"city": 'Sankt "Ö\\x"\nrue', "tags": [1, {"a": [True, None]}]})
NOTHING = ("now", {})

# family, reasoning, text, content, reasoning text, calls
GOLDEN: list[tuple[str, str, str, str, str, list[tuple[str, Any]]]] = [
    (
        "hermes",
        "think",
        "<think>\nHm. <tool_call>?\n</think>\n\nLet me look.\n"
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>\n'
        '<tool_call>\n{"arguments": {"city": "Sankt \\"Ö\\\\x\\"\\nrue", "tags": [1, {"a": [true, null]}]}, "name": "get_weather"}\n</tool_call>\n'
        '<tool_call>{"name": "now"}</tool_call>',
        "Let me look.",
        "Hm. <tool_call>?",
        [PARIS, ODD, NOTHING],
    ),
    (
        "hermes",
        "none",
        '<tool_call>[{"name": "now", "arguments": null}, {"function": {"name": "now", "arguments": "{}"}}]}</tool_call> Done.',
        "Done.",
        "",
        [NOTHING, NOTHING],
    ),
    (
        "qwen3_coder",
        "think",
        "Sure.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n"
        "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=get_weather>\n"
        '<parameter=city>\nSankt "Ö\\x"\nrue\n</parameter>\n<parameter=tags>\n[1, {"a": [true, null]}]\n'
        "</parameter>\n</function>\n</tool_call>\n<function=now>\n</function>",
        "Sure.",
        "",
        [PARIS, ODD, NOTHING],
    ),
    (
        "llama3_json",
        "none",
        '{"name": "get_weather", "parameters": {"city": "Paris", "days": 2}}; {"type": "function", "name": "now", "parameters": {}}',
        "",
        "",
        [PARIS, NOTHING],
    ),
    (
        "llama3_json",
        "none",
        'So: <|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris", "days": 2}}',
        "So:",
        "",
        [PARIS],
    ),
    (
        "llama_pythonic",
        "none",
        "[get_weather(city='Paris', days=2), get_weather(city=\"Sankt \\\"Ö\\\\x\\\"\\nrue\", tags=[1, {'a': (True, None)}]), now()]",
        "",
        "",
        [PARIS, ODD, NOTHING],
    ),
    (
        "lfm_pythonic",
        "think",
        '<think>Hm</think><|tool_call_start|>[get_weather(city="Paris", days=0x2)]<|tool_call_end|>Looking.',
        "Looking.",
        "Hm",
        [PARIS],
    ),
    (
        "mistral",
        "mistral",
        '[THINK]Hm.[/THINK]Ah.[TOOL_CALLS]get_weather[ARGS]{"city": "Paris", "days": 2}[TOOL_CALLS]now[CALL_ID]123456789[ARGS]{}',
        "Ah.",
        "Hm.",
        [PARIS, NOTHING],
    ),
    (
        "mistral",
        "none",
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}, "id": "123456789"}, {"name": "now", "arguments": {}}]',
        "",
        "",
        [PARIS, NOTHING],
    ),
    (
        "gemma4",
        "gemma4",
        "<|channel>thought\nHm.\n<channel|>Ah."
        '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>,days:2}<tool_call|>'
        '<|tool_call>call:get_weather{city:<|"|>Sankt "Ö\\x"\nrue<|"|>,tags:[1,{a:[true,null]}]}<tool_call|>'
        "<|tool_call>call:now{}<tool_call|>",
        "Ah.",
        "Hm.",
        [PARIS, ODD, NOTHING],
    ),
    (
        "function_gemma",
        "none",
        "<start_function_call>call:get_weather{city:<escape>Paris<escape>,days:2}<end_function_call>",
        "",
        "",
        [PARIS],
    ),
    (
        "glm",
        "think",
        "<think></think>\nOk\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>\n"
        '<tool_call>get_weather<arg_key>city</arg_key><arg_value>Sankt "Ö\\x"\nrue</arg_value>'
        "<arg_key>tags</arg_key><arg_value>[1, {'a': [True, None]}]</arg_value></tool_call><tool_call>now</tool_call>",
        "Ok",
        "",
        [PARIS, ODD, NOTHING],
    ),
    (
        "kimi",
        "kimi",
        "<think>Hm. <|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        '{"city": "Paris", "days": 2}<|tool_call_end|><|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}'
        "<|tool_call_end|><|tool_calls_section_end|>",
        "",
        "Hm.",
        [PARIS, NOTHING],
    ),
    (
        "minimax",
        "think",
        'Ok.\n<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Paris</parameter>\n'
        '<parameter name="days">2</parameter>\n</invoke>\n<invoke name="now">\n</invoke>\n</minimax:tool_call>',
        "Ok.",
        "",
        [PARIS, NOTHING],
    ),
    (
        "deepseek",
        "think",
        "<think>Hm</think>Ok.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
        '{"city": "Paris", "days": 2}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n'
        "```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "Ok.",
        "Hm",
        [PARIS, NOTHING],
    ),
    (
        "deepseek",
        "none",
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Paris", "days": 2}<｜tool▁call▁end｜>'
        "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "",
        "",
        [PARIS, NOTHING],
    ),
    (
        "deepseek_v32",
        "none",
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n'
        '<｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="days" string="false">2</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜function_calls>',
        "",
        "",
        [PARIS],
    ),
    (
        "harmony",
        "harmony",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>Let me look.<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
        '{"city": "Paris", "days": 2}<|call|>',
        "Let me look.",
        "Hm.",
        [PARIS],
    ),
    (
        "harmony",
        "harmony",
        " to=functions.now<|channel|>commentary json<|message|>{}<|call|>",
        "",
        "",
        [NOTHING],
    ),
    (
        "harmony",
        "harmony",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>The answer.<|return|>",
        "The answer.",
        "Hm.",
        [],
    ),
]
IDS = [f"{family}-{i}" for i, (family, *_) in enumerate(GOLDEN)]


@pytest.mark.parametrize("golden", GOLDEN, ids=IDS)
def test_reads_what_the_family_writes(golden: Any) -> None:
    family, reasoning, text, content, thoughts, called = golden
    form = choose_format("", family, reasoning)
    for chunks in ([text], list(text), cut(text, list(range(0, len(text), 3)))):
        message = parse(form, chunks)
        assert (message.content, message.reasoning) == (content, thoughts)
        assert message.called == called


@pytest.mark.parametrize("golden", GOLDEN, ids=IDS)
def test_without_tools_only_reasoning_is_parted(golden: Any) -> None:
    family, reasoning, text, _, thoughts, _ = golden
    message = parse(choose_format("", family, reasoning), list(text), tools=())
    assert not message.calls
    if family != "kimi":  # whose calls end its reasoning, where there can be calls
        assert message.reasoning == thoughts


def test_every_family_has_a_golden_text_and_every_name_a_setting() -> None:
    assert {family for family, *_ in GOLDEN} == FAMILIES.keys()
    assert set(get_args(ToolParser)) == {"auto", "none", *FAMILIES}
    assert set(get_args(ReasoningParser)) == {"auto", "none", "harmony", *TAGS}


FRAGMENTS = [
    *(
        text[a:b]
        for _, _, text, *_ in GOLDEN
        for a, b in ((0, 40), (20, 90), (60, 140), (-60, None))
    ),
    *(markup for family in FAMILIES.values() for markup in sorted(family.markup)),
    *("<think>", "</think>", "<", "[", "{", '"', "\\", "\\u12", "\n", " ", "text", "é", "}", "]"),
    *(
        '{"name": "now", "arguments": ',
        '"a": 1',
        "call:now{",
        "now(",
        "functions.now:1",
        "1e",
        "x=",
        ",",
    ),
]


@given(
    golden=st.sampled_from(GOLDEN),
    broken=st.lists(st.sampled_from(FRAGMENTS), max_size=8),
    whole=st.booleans(),
    places=st.lists(st.integers(0, 10_000), max_size=20),
    single=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_any_cut_gives_the_same_message(
    golden: Any, broken: list[str], whole: bool, places: list[int], single: bool
) -> None:
    """Also of markup that is broken in any way; nothing ever raises."""
    family, reasoning, text, *_ = golden
    form = choose_format("", family, reasoning)
    text = (text if whole else "") + "".join(broken)
    logging.disable(logging.WARNING)
    try:
        together = parse(form, [text], single=single)
        assert parse(form, cut(text, places), single=single) == together
        assert parse(form, list(text), single=single) == together
    finally:
        logging.disable(logging.NOTSET)


@given(text=st.text(alphabet="ab <>{}[]\"':=\n", max_size=60), name=st.sampled_from([*FAMILIES]))
@settings(max_examples=300, deadline=None)
def test_plain_text_stays_as_it_is(text: str, name: str) -> None:
    """Brackets and quotes are no markup, and white space counts."""
    logging.disable(logging.WARNING)
    try:
        assert parse(choose_format("", name, "think"), list(text)) == Message(content=text)
    finally:
        logging.disable(logging.NOTSET)


HERMES = choose_format("", "hermes", "think")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", "Write <tool_call> and then JSON."),
        ("hermes", '<tool_call>{"name": 1}</tool_call>'),
        ("hermes", '<tool_call>{"name": "a b", "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "now", "arguments": [1]}</tool_call>'),
        ("hermes", '<tool_call>\n{"name": "now'),
        ("hermes", "1 <tool_"),
        ("qwen3_coder", "<tool_call>nothing</tool_call>"),
        ("llama3_json", '{"name": "Bob", "age": 3}'),
        ("llama3_json", '{"name": "now"}'),
        ("llama3_json", '{"name": "other", "parameters": {}}'),
        ("llama3_json", "[1, 2]"),
        ("llama_pythonic", "[1, 2]"),
        ("llama_pythonic", "[other(a=1)]"),
        ("mistral", "[TOOL_CALLS] I would rather not."),
        ("gemma4", "<|tool_call>nothing<tool_call|>"),
        ("glm", "<tool_call>\nnothing at all</tool_call>"),
        ("kimi", "<|tool_call_begin|>nothing<|tool_call_end|>"),
        ("minimax", "<minimax:tool_call>nothing</minimax:tool_call>"),
        ("deepseek", "<｜tool▁call▁begin｜>nothing"),
    ],
)
def test_what_is_no_call_is_text_and_logged(
    name: str, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    message = parse(choose_format("", name, "none"), list(text))
    assert message == Message(content=text)
    if name not in ("llama_pythonic",) and text != "1 <tool_":
        assert "is text" in caplog.text


def test_a_malformed_call_does_not_hide_the_next() -> None:
    text = '<tool_call>{"nope"}</tool_call> <tool_call>{"name": "now", "arguments": {}}</tool_call>'
    message = parse(HERMES, list(text))
    assert message.content == '<tool_call>{"nope"}</tool_call>'
    assert message.called == [NOTHING]


@pytest.mark.parametrize(
    ("family", "call", "close"),
    [
        ("hermes", '<tool_call>\n{"name": "now", "arguments": {}}', "\n</tool_call>"),
        ("qwen3_coder", "<tool_call>\n<function=now>\n</function>", "\n</tool_call>"),
        ("lfm_pythonic", "<|tool_call_start|>[now()]", "<|tool_call_end|>"),
        (
            "minimax",
            '<minimax:tool_call>\n<invoke name="now">\n</invoke>',
            "\n</minimax:tool_call>",
        ),
    ],
)
def test_an_answer_that_is_cut_within_the_end_of_a_call(family: Any, call: str, close: str) -> None:
    for size in range(len(close) + 1):
        message = parse(Format(FAMILIES[family], None), [call + close[:size]])
        assert (message.content, message.called) == ("", [NOTHING])


def test_arguments_that_go_wrong_stay_arguments(caplog: pytest.LogCaptureFixture) -> None:
    """They have been sent by then; the client sees what the model wrote."""
    text = '<tool_call>{"name": "now", "arguments": {"a": oops}}</tool_call>after'
    message = parse(HERMES, list(text))
    assert message.calls == [["id0", "now", '{"a": oops}}']]
    assert message.content == "after"
    assert "malformed" in caplog.text


def test_a_call_cut_short_keeps_what_came() -> None:
    message = parse(HERMES, list('<tool_call>{"name": "get_weather", "arguments": {"city": "Par'))
    assert message.calls == [["id0", "get_weather", '{"city": "Par']]


def test_habits_of_models_are_put_right() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": "x\ny\\d", "b": True}}}</tool_call>'
    assert parse(HERMES, list(text)).called == [("f", {"a": "x\ny\\d", "b": True})]


def test_arguments_stream_while_they_come() -> None:
    parser = OutputParser(HERMES, TOOLS)
    head = parser.push('<tool_call>{"name": "get_weather", "arguments": {"city": "Pa').tool_calls
    assert [(d.index, d.name, d.arguments) for d in head] == [(0, "get_weather", '{"city": "Pa')]
    more = parser.push("ris").tool_calls
    assert [(d.index, d.id, d.name, d.arguments) for d in more] == [(0, None, None, "ris")]


def test_strings_of_element_formats_stream_too() -> None:
    parser = OutputParser(choose_format("", "qwen3_coder", "none"), TOOLS)
    parser.push("<tool_call><function=get_weather><parameter=city>\nPa")
    assert [d.arguments for d in parser.push("ris\n").tool_calls] == ["ris"]
    rest = parser.push("</parameter></function>").tool_calls
    assert "".join(d.arguments for d in rest) == '"}'


@pytest.mark.parametrize(
    ("text", "value"),
    [("null", None), ("plain", "plain"), ("3", "3"), ('"quoted"', '"quoted"')],
)
def test_values_of_elements_follow_the_schema(text: str, value: Any) -> None:
    markup = (
        f"<tool_call>get_weather<arg_key>note</arg_key><arg_value>{text}</arg_value></tool_call>"
    )
    message = parse(choose_format("", "glm", "none"), list(markup))
    assert message.called == [("get_weather", {"note": value})]


@pytest.mark.parametrize(
    ("text", "value"), [("3", 3), ("True", True), ("x y", "x y"), ("[1,", "[1,"), ("NaN", "NaN")]
)
def test_values_of_unknown_parameters_are_guessed(text: str, value: Any) -> None:
    markup = f"<tool_call>now<arg_key>x</arg_key><arg_value>{text}</arg_value></tool_call>"
    message = parse(choose_format("", "glm", "none"), list(markup))
    assert message.called == [("now", {"x": value})]


def test_reasoning_that_the_prompt_opened() -> None:
    message = parse(HERMES, list("Hm.\n</think>\n\nYes."), thinking=True)
    assert message == Message(content="Yes.", reasoning="Hm.")
    assert parse(HERMES, ["Hm."], thinking=True) == Message(reasoning="Hm.")
    always = choose_format("", "none", "deepseek_r1")
    assert parse(always, list("Hm.</think>Yes.")) == Message(content="Yes.", reasoning="Hm.")


def test_reasoning_tags_within_an_answer_are_text() -> None:
    text = "The <think> tag opens, </think> closes.\n"
    assert parse(HERMES, list(text)) == Message(content=text)


def test_gemmas_other_quotes() -> None:
    text = '<|tool_call>call: now{a:"x, \\"y\\"",<|"|>b<|"|>:[]}<tool_call|>'
    message = parse(choose_format("", "gemma4", "none"), list(text))
    assert message.called == [("now", {"a": 'x, "y"', "b": []})]


def test_one_call_at_most() -> None:
    call = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    message = parse(HERMES, list("a" + call + call + "b"), single=True)
    assert message.called == [NOTHING] and message.content == "a"


def test_the_models_own_ids_are_kept_once() -> None:
    call = "<|tool_call_begin|>functions.now:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
    message = parse(choose_format("", "kimi", "none"), [call + call])
    assert [call_id for call_id, *_ in message.calls] == ["functions.now:0", "id0"]


def test_mistrals_ids_are_what_its_templates_take() -> None:
    parser = OutputParser(choose_format("", "mistral", "none"), TOOLS)
    call = parser.push("[TOOL_CALLS]now[ARGS]{}").tool_calls[0]
    assert call.id is not None and len(call.id) == 9 and call.id.isalnum()


TEMPLATES = [
    # a line of the template, the tools' family, the reasoning's tags
    ("<|start|>assistant<|channel|>analysis … commentary to=functions", "harmony", "harmony"),
    ("{{ '<minimax:tool_call>' }} </think>", "minimax", "think"),
    ("<|tool_call>call: <tool_call|> <|channel> <channel|>", "gemma4", "gemma4"),
    ("<start_function_call>call:", "function_gemma", None),
    ("<｜DSML｜function_calls></think>", "deepseek_v32", "think"),
    ("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜></think>", "deepseek", "think"),
    ("<|tool_calls_section_begin|><|tool_call_begin|></think>", "kimi", "kimi"),
    ("<tool_call>{{ name }}<arg_key> <think></think>", "glm", "think"),
    ("[AVAILABLE_TOOLS] [TOOL_CALLS] [THINK]", "mistral", "mistral"),
    ("<tool_call>\n<function=example>\n<parameter=", "qwen3_coder", None),
    ("<|tool_call_start|>[", "lfm_pythonic", None),
    ("[func_name1(params_name1=params_value1", "llama_pythonic", None),
    ('<tool_call>\n{"name": … </think>', "hermes", "think"),
    ("<|python_tag|>", "llama3_json", None),
    ("<seed:think>", None, "seed_oss"),
    ("◁think▷", None, "kimi_vl"),
    ("<|START_THINKING|>", None, "cohere"),
    ("<|im_start|>", None, None),
]


@pytest.mark.parametrize(("template", "tools", "reasoning"), TEMPLATES)
def test_the_template_tells_the_format(
    template: str, tools: str | None, reasoning: str | None
) -> None:
    family = family_in(template)
    assert (family and family.name, reasoning_in(template)) == (tools, reasoning)
    assert choose_format(template, "none", "none") == Format()
    named = choose_format(template, "hermes", "none")
    assert named.family is FAMILIES["hermes"] and named.tags is None
