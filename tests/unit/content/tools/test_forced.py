"""Forced and guarded calls: what the grammars accept, by the library that follows them."""

from __future__ import annotations

import json
from typing import Any

import llguidance
import pytest

import byte_vocabulary
from mlx_serving.content.forced import forcing_grammar, guarding_grammar
from mlx_serving.content.output import OutputParser, choose_format

GET: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "unit": {"enum": ["C", "F"]}, "c": {"type": "string"}},
    "required": ["a"],
}
FUNCTIONS = {"get": GET, "nop": {"type": "object", "properties": {}}}
EOS = 256
SPECIAL = {"[TOOL_CALLS]": 257, "[/THINK]": 258}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> llguidance.LLTokenizer:
    from tokenizers import AddedToken, Tokenizer

    path = byte_vocabulary.write(tmp_path_factory.mktemp("bytes"), eos=EOS)
    backend = Tokenizer.from_file(str(path))
    backend.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    return llguidance.LLTokenizer(backend.to_str(), n_vocab=259, eos_token=[EOS])


def spell(text: str) -> list[int]:
    for name, token_id in SPECIAL.items():
        text = text.replace(name, chr(0xE000 + token_id))
    return [
        token_id
        for letter in text
        for token_id in (
            [ord(letter) - 0xE000] if 0xE000 <= ord(letter) < 0xE200 else letter.encode()
        )
    ]


def accepts(tokenizer: llguidance.LLTokenizer, grammar: str | None, ids: list[int]) -> bool:
    assert grammar is not None
    lark = llguidance.LLMatcher.grammar_from_lark(grammar)
    matcher = llguidance.LLMatcher(tokenizer, lark, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


CALL = '<tool_call>\n{"name": "get", "arguments": {"a": 1, "unit": "C"}}\n</tool_call>'
NOP = '<tool_call>\n{"name": "nop", "arguments": {}}\n</tool_call>'
QWEN = (
    "<tool_call>\n<function=get>\n<parameter=a>\n{a}\n</parameter>\n<parameter=unit>\nC\n</parameter>\n"
    "<parameter=c>\n{c}\n</parameter>\n</function>\n</tool_call>"
)
KIMI = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.get:0<|tool_call_argument_begin|>"
    '{"a": 1}<|tool_call_end|><|tool_calls_section_end|>'
)
DEEPSEEK = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{head}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
FORCED = [
    # family, reasoning, template, text, accepted
    ("hermes", "none", "", CALL, True),
    ("hermes", "none", "", CALL + "\n" + NOP, True),
    ("hermes", "none", "", "Sure. " + CALL, False),
    ("hermes", "none", "", "", False),
    ("hermes", "none", "", CALL.replace('"C"', '"K"'), False),
    ("hermes", "none", "", CALL.replace('"a"', '"b"'), False),
    ("hermes", "think", "", "<think>\nHm </thin </think>\n\n" + CALL, True),
    ("hermes", "think", "", CALL, True),
    ("hermes", "deepseek_r1", "", "Hm</think>" + CALL, True),
    ("hermes", "deepseek_r1", "", CALL, False),
    ("kimi", "none", "", KIMI, True),
    ("llama3_json", "none", "", '{"name": "get", "parameters": {"a": 1}}', True),
    ("mistral", "none", "", '[TOOL_CALLS][{"name": "get", "arguments": {"a": 1}}]', True),
    ("mistral", "none", "[ARGS]", '[TOOL_CALLS]get[ARGS]{"a": 1}[TOOL_CALLS]nop[ARGS]{}', True),
    ("deepseek", "none", "", DEEPSEEK.replace("{head}", 'get<｜tool▁sep｜>{"a": 1}'), True),
    (
        "deepseek",
        "none",
        "```json",
        DEEPSEEK.replace("{head}", 'function<｜tool▁sep｜>get\n```json\n{"a": 1}\n```'),
        True,
    ),
    ("qwen3_coder", "none", "", QWEN.format(a=1, c="text with </ <parameter> in\n it"), True),
    ("qwen3_coder", "none", "", QWEN.format(a='"1"', c="x"), False),
    ("qwen3_coder", "none", "", QWEN.format(a=1, c="x").replace("C\n", "K\n"), False),
    (
        "glm",
        "none",
        "</arg_key><arg_value>",
        "<tool_call>get<arg_key>a</arg_key><arg_value>1</arg_value></tool_call><tool_call>nop</tool_call>",
        True,
    ),
    (
        "glm",
        "think",
        "",
        "</think><tool_call>get\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>",
        False,
    ),
    (
        "minimax",
        "none",
        "",
        '<minimax:tool_call>\n<invoke name="get">\n<parameter name="a">1</parameter>\n'
        '</invoke>\n<invoke name="nop">\n</invoke>\n</minimax:tool_call>',
        True,
    ),
    (
        "deepseek_v32",
        "none",
        "",
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="get">\n'
        '<｜DSML｜parameter name="a" string="false">1</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="c" string="true">x</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n</｜DSML｜function_calls>",
        True,
    ),
    (
        "harmony",
        "harmony",
        "",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
        '<|channel|>commentary to=functions.get <|constrain|>json<|message|>{"a": 1}',
        True,
    ),
]


@pytest.mark.parametrize(("family", "reasoning", "template", "text", "accepted"), FORCED)
def test_forced(
    tokenizer: llguidance.LLTokenizer,
    family: str,
    reasoning: str,
    template: str,
    text: str,
    accepted: bool,
) -> None:
    form = choose_format(template, family, reasoning)
    grammar = forcing_grammar(form, template, FUNCTIONS, SPECIAL.get, parallel=True, thinking=False)
    assert accepts(tokenizer, grammar, spell(text)) == accepted
    if accepted:
        # What is forced is what the parser reads.
        tools = [{"function": {"name": name}} for name in FUNCTIONS]
        parser = OutputParser(form, tools)
        calls = [*parser.push(text).tool_calls, *parser.finish().tool_calls]
        assert calls[0].name == "get" and json.loads(calls[0].arguments)["a"] == 1


def test_one_call_when_not_parallel(tokenizer: llguidance.LLTokenizer) -> None:
    form = choose_format("", "hermes", "none")
    grammar = forcing_grammar(form, "", FUNCTIONS, SPECIAL.get, parallel=False, thinking=False)
    assert accepts(tokenizer, grammar, spell(CALL))
    assert not accepts(tokenizer, grammar, spell(CALL + "\n" + NOP))


@pytest.mark.parametrize(
    ("family", "text", "accepted"),
    [
        ("hermes", "Just text, with a < and <tool_cal.", True),
        ("hermes", "", True),
        ("hermes", "Hm. " + CALL + "\n" + NOP, True),
        ("hermes", "Hm. " + CALL.replace("1", '"1"'), False),
        ("hermes", "Hm. <tool_call>x", False),
        ("kimi", "Hm. " + KIMI, True),
        ("kimi", "Hm. " + KIMI.replace("1", '"1"'), False),
        ("qwen3_coder", "Hm. " + QWEN.format(a=1, c="x"), True),
        ("qwen3_coder", "Hm. " + QWEN.format(a="x", c="x"), False),
        ("mistral", 'Hm[.[TOOL_CALLS][{"name": "get", "arguments": {"a": 1}}]', True),
        ("mistral", 'Hm[.[TOOL_CALLS][{"name": "get", "arguments": {"a": "1"}}]', False),
    ],
)
def test_guarded(tokenizer: llguidance.LLTokenizer, family: str, text: str, accepted: bool) -> None:
    form = choose_format("", family, "none")
    grammar = guarding_grammar(form, "", FUNCTIONS, SPECIAL.get, parallel=True, thinking=False)
    assert accepts(tokenizer, grammar, spell(text)) == accepted


def test_formats_that_cannot_be_forced() -> None:
    for family in ("gemma4", "function_gemma", "lfm_pythonic", "llama_pythonic", "none"):
        form = choose_format("", family, "none")
        for grammar in (forcing_grammar, guarding_grammar):
            assert grammar(form, "", FUNCTIONS, SPECIAL.get, parallel=True, thinking=False) is None
    bare = choose_format("", "llama3_json", "none")
    assert guarding_grammar(bare, "", FUNCTIONS, SPECIAL.get, parallel=True, thinking=False) is None


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "maxLength": 3},
        {"anyOf": [{"type": "string"}, {"type": "null"}]},
        {},
        {"type": "array", "items": {"$ref": "#/$defs/x"}},
    ],
)
def test_elements_that_cannot_say_what_a_schema_wants(schema: dict[str, Any]) -> None:
    """Text between tags has no length, and no type."""
    form = choose_format("", "qwen3_coder", "none")
    functions = {"f": {"type": "object", "properties": {"a": schema}}}
    for grammar in (forcing_grammar, guarding_grammar):
        assert grammar(form, "", functions, SPECIAL.get, parallel=True, thinking=False) is None
