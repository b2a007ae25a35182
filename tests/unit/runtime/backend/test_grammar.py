"""Grammars against JSON Schema's own validator: whatever the matcher lets through is valid."""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import byte_vocabulary
from mlx_serving.content import structured
from mlx_serving.errors import InvalidRequest
from mlx_serving.runtime.backend.grammar import MAX_CACHED, Grammars, ReadTokenizers
from mlx_serving.runtime.backend.runaway import Bounds
from mlx_serving.runtime.core.plan import Constraint, Matcher
from mlx_serving.types import Grammar

EOS = 256
VOCAB = 259
"""Wider than the tokenizer, as logits often are."""


def closed(required: bool = True, **properties: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**schema, "required": list(properties)} if required else schema


STRING, INTEGER, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}
LINKED = closed(value=INTEGER, next={"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]})
SCHEMAS: dict[str, Any] = {
    "object": closed(name=STRING, age=INTEGER),
    "optional": closed(False, a=STRING, b={"type": "null"}, c={"type": "boolean"}),
    "open": {"type": "object", "properties": {"a": INTEGER}, "required": ["a"]},
    "typed rest": {"properties": {"a": INTEGER}, "type": "object", "additionalProperties": STRING},
    "required only": {"type": "object", "required": ["a", "b"]},
    "pattern names": {
        "type": "object",
        "patternProperties": {"^n_": INTEGER, "^s_": STRING},
        "additionalProperties": False,
    },
    "few properties": {"type": "object", "maxProperties": 2, "additionalProperties": INTEGER},
    "enum": {"enum": ["a", "b", 3, None, {"x": [1]}]},
    "const": {"const": {"a": [1, 2, "\u00e9\n"]}},
    "types": {"type": ["string", "null", "integer"]},
    "array": {"type": "array", "items": INTEGER, "minItems": 2, "maxItems": 4},
    "tuple": {"type": "array", "prefixItems": [STRING, NUMBER], "items": False, "minItems": 2},
    "nested": {
        "type": "array",
        "items": closed(p=closed(q={"type": "array", "items": {"enum": ["x", "y"]}})),
        "maxItems": 2,
    },
    "recursive": {"$defs": {"node": LINKED}, "$ref": "#/$defs/node"},
    "ref and more": {"$defs": {"s": STRING}, "$ref": "#/$defs/s", "maxLength": 3},
    "any of": {
        "anyOf": [
            {"type": "string", "maxLength": 3},
            {"type": "integer", "minimum": 10, "maximum": 20},
            closed(k={"const": 1}),
        ]
    },
    "any required": {
        **closed(False, a=STRING, b=INTEGER),
        "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
    },
    "one of": {"oneOf": [closed(t={"const": "a"}, x=INTEGER), closed(t={"const": "b"})]},
    "all of": {
        "allOf": [
            {"type": "object", "properties": {"a": STRING}, "required": ["a"]},
            {"properties": {"b": NUMBER}, "required": ["b"]},
        ]
    },
    "integers": {"type": "integer", "minimum": -5, "exclusiveMaximum": 123},
    "numbers": {"type": "number", "exclusiveMinimum": -1.5, "maximum": 2.25},
    "multiples": {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 1000},
    "length": {"type": "string", "minLength": 3, "maxLength": 5},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    "pattern inside": {"type": "string", "pattern": "[a-z]{3}", "maxLength": 9},
    "date": {"type": "string", "format": "date"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "ipv6": {"type": "string", "format": "ipv6"},
    "uuid": {"type": "string", "format": "uuid"},
    "email": {"type": "string", "format": "email", "maxLength": 30},
    "int64": {"type": "integer", "format": "int64", "title": "T", "description": "D"},
    "anything": True,
}


@pytest.fixture(scope="module")
def grammars(tmp_path_factory: pytest.TempPathFactory) -> Grammars:
    path = byte_vocabulary.write(tmp_path_factory.mktemp("vocabulary"), eos=EOS)
    return Grammars(path, VOCAB, (EOS,))


def allowed(matcher: Matcher) -> list[int]:
    mask = matcher.mask()
    assert mask is not None
    return [t for t in range(VOCAB) if mask[t >> 3] >> (t & 7) & 1]


def wander(constraint: Constraint, rng: random.Random, limit: int = 300) -> bytes | None:
    """Allowed bytes at random, closing brackets likelier; None if no end was met."""
    matcher, output = constraint.matcher(()), bytearray()
    while len(output) < limit:
        options = allowed(matcher)
        if EOS in options and (len(options) == 1 or rng.random() < 0.5):
            return bytes(output)
        closing = [t for t in options if chr(t) in '"]}']
        token = rng.choice(closing if closing and rng.random() < 0.4 else options)
        if token != EOS:
            matcher.accept(token)
            output.append(token)
    return None


def accepts(constraint: Constraint, text: str) -> bool:
    matcher = constraint.matcher(())
    for byte in text.encode():
        if byte not in allowed(matcher):
            return False
        matcher.accept(byte)
    return EOS in allowed(matcher)


@pytest.mark.parametrize("name", SCHEMAS)
def test_whatever_is_let_through_is_valid(name: str, grammars: Grammars) -> None:
    schema = SCHEMAS[name]
    constraint = grammars.compile(structured.json_schema(schema, param="p"))
    rng, check = random.Random(name), jsonschema.FormatChecker()
    validator = jsonschema.Draft202012Validator(schema, format_checker=check)
    outputs = [o for _ in range(12) if (o := wander(constraint, rng)) is not None]
    assert len(outputs) >= 3
    for output in outputs:
        validator.validate(json.loads(output))


def test_an_object_is_any_object(grammars: Grammars) -> None:
    constraint = grammars.compile(Grammar(kind="json_object"))
    assert accepts(constraint, '{"a": [1, {"b": null}], "c": "x"}')
    assert not accepts(constraint, "[1]")
    rng = random.Random(1)
    outputs = [o for _ in range(12) if (o := wander(constraint, rng)) is not None]
    assert outputs and all(isinstance(json.loads(o), dict) for o in outputs)


def test_white_space_cannot_run_away(grammars: Grammars) -> None:
    schema = structured.json_schema(closed(a=INTEGER), param="p")
    loose = grammars.compile(schema)
    assert accepts(loose, '{"a":1}') and accepts(loose, '{\n  "a": 1\n}')
    assert not accepts(loose, '{"a":' + " " * 21 + "1}") and not accepts(loose, '{"a":1}\n')
    tight = structured.json_schema(closed(a=INTEGER), param="p", white_space="")
    assert accepts(grammars.compile(tight), '{"a":1}')
    assert not accepts(grammars.compile(tight), '{"a": 1}')
    own = structured.json_schema(closed(a=INTEGER), param="p", white_space=" ")
    assert accepts(grammars.compile(own), '{"a": 1}')
    assert not accepts(grammars.compile(own), '{"a":  1}')


def run_of(letter: str, grammars: Grammars, grammar: Grammar, begun: str) -> int:
    """How many of `letter` may come after `begun`; 200: as many as one likes."""
    matcher = grammars.compile(grammar).matcher(begun.encode())
    run = 0
    while ord(letter) in allowed(matcher) and run < 200:
        matcher.accept(ord(letter))
        run += 1
    return run


def of_schema(schema: Any) -> Grammar:
    return structured.json_schema(schema, param="p")


def test_digits_cannot_run_away(grammars: Grammars) -> None:
    def longest(schema: Any, begun: str) -> int:
        return run_of("3", grammars, of_schema(schema), begun)

    assert longest(NUMBER, "0.") == longest(INTEGER, "1") + 1 == Bounds().digit_tokens
    assert longest(INTEGER, "-") == Bounds().digit_tokens
    # Where they mean something else, or nothing but a digit may come, they are left alone.
    assert longest(STRING, '"') == 200
    assert longest({"type": "string", "pattern": "^[0-9]{100}$"}, '"') == 100


@pytest.fixture(scope="module")
def tight(tmp_path_factory: pytest.TempPathFactory) -> Grammars:
    path = byte_vocabulary.write(tmp_path_factory.mktemp("tight"), eos=EOS)
    return Grammars(path, VOCAB, (EOS,), Bounds(digit_tokens=5, string_tokens=8, white_space=2))


def test_the_bounds_can_be_set(tight: Grammars) -> None:
    pair = of_schema(closed(a=STRING, b=INTEGER))
    assert run_of("3", tight, pair, '{"a":"x","b":') == 5
    assert run_of("x", tight, pair, '{"a":"') == 8
    assert accepts(tight.compile(pair), '{  "a":"abc","b":1}')
    assert not accepts(tight.compile(pair), '{   "a":"abc","b":1}')
    # A resumed sequence counts on from where it was.
    assert run_of("x", tight, pair, '{"a":"xxxxx') == 3


def test_strings_end_only_where_their_schema_lets_them(tight: Grammars) -> None:
    assert run_of("x", tight, of_schema({"type": "string", "minLength": 30}), '"') == 30
    assert run_of("x", tight, of_schema({"type": "string", "maxLength": 5}), '"') == 5
    assert run_of("x", tight, of_schema({"enum": ["x" * 20, "x" * 25]}), '"') == 25
    # An escaped quotation mark is no end: backslash and mark are one token's business.
    assert run_of("x", tight, of_schema(STRING), '"ab\\n') == 4


def test_free_text_and_other_grammars_have_no_such_bounds(tight: Grammars) -> None:
    thought = Grammar(kind="json_object", before='before: /[^<]*/ "</t>"')
    assert run_of("x", tight, thought, '"') == run_of("3", tight, thought, "1") == 200
    assert run_of("x", tight, thought, 'a</t>{"') == 8
    assert run_of("3", tight, Grammar(kind="regex", text="[0-9]{3,99}"), "1") == 98
    assert run_of("x", tight, Grammar(kind="lark", text='start: "\\"" /x*/ "\\""'), '"') == 200


def test_forced_calls_are_bounded_too(tight: Grammars) -> None:
    schema = json.dumps(closed(a=NUMBER, b=STRING))
    call = Grammar(kind="lark", text=f"start: /<call>/ args /<.call>/\nargs: %json {schema}")
    assert run_of("3", tight, call, '<call>{"a":1.') == 5
    assert run_of("x", tight, call, '<call>{"a":1,"b":"') == 8


def test_zero_is_no_bound(tmp_path: Path) -> None:
    path = byte_vocabulary.write(tmp_path, eos=EOS)
    loose = Grammars(path, VOCAB, (EOS,), Bounds(digit_tokens=0, string_tokens=0, white_space=0))
    assert run_of("3", loose, of_schema(NUMBER), "0.") == 200
    assert run_of("x", loose, of_schema(STRING), '"') == 200
    assert not accepts(loose.compile(of_schema(closed(a=INTEGER))), '{"a": 1}')


@pytest.mark.parametrize("number", [2**53, -(2**53), 0.1, 1e21, 1e-7, 0.30000000000000004, 1.0])
def test_numbers_are_written_exactly(number: float, grammars: Grammars) -> None:
    constraint = grammars.compile(structured.json_schema({"const": number}, param="p"))
    output = wander(constraint, random.Random(0))
    assert output is not None and json.loads(output) == number


def test_expressions_match_as_a_whole(grammars: Grammars) -> None:
    constraint = grammars.compile(Grammar(kind="regex", text=r"(\d{3}-)+[a-c]?"))
    assert accepts(constraint, "123-") and accepts(constraint, "123-456-b")
    assert not accepts(constraint, "123") and not accepts(constraint, "x123-")
    rng = random.Random(2)
    for _ in range(10):
        output = wander(constraint, rng)
        assert output is not None and re.fullmatch(r"(\d{3}-)+[a-c]?", output.decode())


def test_choices_are_literal(grammars: Grammars) -> None:
    choices = ["a", "ab", "x.y*z|w", "a b", "\n\t", "\u00e9 \U0001f600", "<a>#&-~"]
    constraint = grammars.compile(structured.choice(choices, param="p"))
    assert all(accepts(constraint, choice) for choice in choices)
    assert not any(accepts(constraint, wrong) for wrong in ("", "b", "xzyz", "abc", "x.y*z"))


def test_lark_grammars(grammars: Grammars) -> None:
    text = 'start: "(" start ")" | NAME\nNAME: /[a-z]+/'
    constraint = grammars.compile(structured.lark(text, param="p"))
    assert accepts(constraint, "((ab))") and not accepts(constraint, "((ab)")


IMPOSSIBLE = [
    (Grammar(kind="regex", text="(?=a)b", param="guided_regex"), "look-around"),
    (Grammar(kind="regex", text="(", param="guided_regex"), "unclosed group"),
    (
        Grammar(kind="lark", text="start: nothing", param="guided_grammar"),
        'unknown name: "nothing"',
    ),
    (Grammar(kind="lark", text='root ::= "a"', param="guided_grammar"), "Expected token"),
    (Grammar(kind="json_schema", text='{"contains": {}}'), "contains"),
    (Grammar(kind="json_schema", text='{"type":"string","format":"colour"}'), "format: colour"),
    (Grammar(kind="json_schema", text='{"oneOf":[{"type":"number"},{"type":"integer"}]}'), "oneOf"),
    (Grammar(kind="json_schema", text='{"$ref":"#/$defs/none"}'), "none"),
    (Grammar(kind="json_schema", text='{"$ref":"http://example.org/x"}'), "example.org"),
    (Grammar(kind="json_schema", text='{"$ref":"#"}'), "nothing can satisfy it"),
    (Grammar(kind="json_schema", text="false"), "Unsatisfiable"),
    (Grammar(kind="json_schema", text='{"type":"integer","minimum":5,"maximum":4}'), "minimum (5)"),
    (Grammar(kind="json_schema", text='{"type":"integer","multipleOf":982451653}'), "fuel"),
    (Grammar(kind="json_schema", text="[]"), "object"),
]


@pytest.mark.parametrize(("grammar", "reason"), IMPOSSIBLE)
def test_what_cannot_be_followed_is_refused(
    grammar: Grammar, reason: str, grammars: Grammars
) -> None:
    with pytest.raises(InvalidRequest) as error:
        grammars.compile(grammar)
    assert reason in error.value.message and error.value.param == grammar.param


def test_a_model_that_cannot_be_constrained_says_so(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no token that ends"):
        Grammars(byte_vocabulary.write(tmp_path, eos=EOS), VOCAB, ()).compile(
            Grammar(kind="json_object")
        )
    with pytest.raises(InvalidRequest, match="cannot be constrained"):
        Grammars(tmp_path / "none.json", VOCAB, (EOS,)).compile(Grammar(kind="json_object"))


def test_matchers_of_one_grammar_are_apart(grammars: Grammars) -> None:
    constraint = grammars.compile(Grammar(kind="regex", text="[ab][cd]"))
    one, other = constraint.matcher(()), constraint.matcher(())
    one.accept(ord("a"))
    assert bytes(allowed(one)) == b"cd" and bytes(allowed(other)) == b"ab"
    assert bytes(allowed(constraint.matcher(b"b"))) == b"cd"
    one.accept(ord("d"))
    assert allowed(one) == [EOS]
    one.accept(EOS)
    assert one.mask() is None, "after the end anything may come: nobody reads it"


def test_a_matcher_tells_of_its_error_once(grammars: Grammars) -> None:
    matcher = grammars.compile(Grammar(kind="regex", text="ab", param="guided_regex")).matcher(())
    matcher.accept(ord("x"))
    with pytest.raises(InvalidRequest) as error:
        matcher.mask()
    assert error.value.param == "guided_regex"
    matcher.accept(ord("y"))
    assert matcher.mask() is None


def test_only_the_latest_grammars_are_kept(grammars: Grammars) -> None:
    for i in range(MAX_CACHED + 10):
        grammars.compile(Grammar(kind="regex", text=f"a{{{i + 1}}}"))
    assert len(grammars._compiled) == MAX_CACHED


def test_a_tokenizer_is_read_once_for_models_that_come_back(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
        byte_vocabulary.write(folder, eos=EOS)
    first, second = (folder / "tokenizer.json" for folder in folders)
    kept = ReadTokenizers(most=1)

    def get(path: Path, eos: int = EOS) -> object:
        return kept.get(path, VOCAB, (eos,), Bounds())

    once = get(first)
    assert get(first) is once
    assert get(first, eos=3) is not once  # and it takes its place
    again = get(first)
    assert again is not once and get(first) is again
    os.utime(first, ns=(1, 1))
    assert get(first) is not again
    get(second)
    assert len(kept._kept) == 1
    with pytest.raises(OSError):
        get(tmp_path / "tokenizer.json")
