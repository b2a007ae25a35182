"""From clients' shapes to a bounded Grammar; refusals name field and keyword."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from mlx_serving.content import structured
from mlx_serving.errors import InvalidRequest, UnsupportedParameter
from mlx_serving.types import Grammar


def refusal(schema: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as error:
        structured.json_schema(schema, param="response_format")
    assert error.value.param == "response_format"
    return error.value


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"not": {}}, "not"),
        ({"if": {}, "then": {}}, "if"),
        ({"type": "array", "contains": {}}, "contains"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "uniqueItems": 0}, "uniqueItems"),
        ({"type": "object", "propertyNames": {}}, "propertyNames"),
        ({"type": "object", "dependentRequired": {}}, "dependentRequired"),
        ({"type": "object", "unevaluatedProperties": False}, "unevaluatedProperties"),
        ({"type": "object", "minProperties": 2, "required": ["a"]}, "minProperties"),
        ({"type": "string", "maxlength": 3}, "maxlength"),
        ({"type": "string", "format": "int32"}, "format: int32"),
        ({"type": "integer", "minimum": 3, "exclusiveMinimum": True}, "exclusiveMinimum"),
    ],
)
@pytest.mark.parametrize(
    "inside",
    [
        lambda s: s,
        lambda s: {"properties": {"not": s}},
        lambda s: {"items": s},
        lambda s: {"items": [s]},
        lambda s: {"additionalProperties": s},
        lambda s: {"patternProperties": {"^x": s}},
        lambda s: {"$defs": {"x": s}},
        lambda s: {"anyOf": [True, {"allOf": [s]}]},
        lambda s: {"prefixItems": [s]},
    ],
)
def test_a_keyword_that_is_not_followed_is_named_wherever_it_is(
    schema: dict[str, Any], keyword: str, inside: Any
) -> None:
    error = refusal(inside(schema))
    assert isinstance(error, UnsupportedParameter) and f"'{keyword}" in error.message


def test_what_asks_for_nothing_is_dropped() -> None:
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "T",
        "x-guidance": {"lenient": True},
        "type": "object",
        "properties": {"title": {"type": "integer", "format": "int64", "default": 1}},
        "required": ["title"],
        "minProperties": 1,
        "uniqueItems": False,
    }
    grammar = structured.json_schema(schema, param="p")
    assert msgspec.json.decode(grammar.text) == {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {"title": {"type": "integer"}},
        "required": ["title"],
    }
    # Not a schema's place: these are values.
    values = {"enum": [{"not": 1}], "const": {"contains": 2}}
    assert msgspec.json.decode(structured.json_schema(values, param="p").text) == values


def test_bounds() -> None:
    deep: Any = True
    for _ in range(structured.MAX_DEPTH):
        deep = {"items": deep}
    structured.json_schema(deep, param="p")
    assert "schemas deep" in refusal({"items": deep}).message
    long = {"enum": ["x" * structured.MAX_CHARS]}
    assert str(structured.MAX_CHARS) in refusal(long).message
    many = {f"p{i}": True for i in range(structured.MAX_PROPERTIES + 1)}
    assert str(structured.MAX_PROPERTIES) in refusal({"properties": many}).message
    halves = {f"p{i}": {"properties": dict.fromkeys(many, True)} for i in range(2)}
    halves["p0"]["properties"].popitem()
    halves["p1"]["properties"].popitem()
    assert "1000 properties" in refusal({"properties": halves}).message
    assert "500" in refusal({"required": list(many)}).message
    names = dict.fromkeys(list(many)[: structured.MAX_PATTERN_PROPERTIES + 1], True)
    assert "32" in refusal({"patternProperties": names}).message
    with pytest.raises(InvalidRequest, match="'&'"):
        structured.lark("start: A\nA: " + "&".join(["/a/"] * 10), param="p")
    for call in (structured.regex, structured.lark):
        with pytest.raises(InvalidRequest, match=str(structured.MAX_CHARS)):
            call("x" * (structured.MAX_CHARS + 1), param="p")
    with pytest.raises(InvalidRequest, match=str(structured.MAX_CHOICES)):
        structured.choice(["x"] * (structured.MAX_CHOICES + 1), param="p")


PATTERN = {"type": "string", "pattern": "a.*b"}
CHAIN = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}", "pattern": "a"} for i in range(9)}
DOUBLING = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(30)}


@pytest.mark.parametrize(
    ("schema", "what"),
    [
        ({"allOf": [PATTERN] * 9}, "patterns"),
        ({"allOf": [{"properties": {"a": {"items": PATTERN}}}] * 9}, "patterns"),
        ({"$defs": CHAIN, "$ref": "#/$defs/d0"}, "patterns"),
        ({"pattern": "a", "anyOf": [{"allOf": [PATTERN] * 8}]}, "patterns"),
        ({"allOf": [{"anyOf": [{"type": "null"}] * 3}] * 5}, "alternatives"),
        ({"$defs": DOUBLING, "$ref": "#/$defs/d0"}, "alternatives"),
        ({"multipleOf": 1009}, "multipleOf"),
        ({"allOf": [{"multipleOf": 0.7}, {"multipleOf": 11}, {"multipleOf": 26}]}, "multipleOf"),
    ],
)
def test_combinations_that_would_take_long_are_refused(schema: Any, what: str) -> None:
    assert what in refusal(schema).message


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {f"p{i}": PATTERN for i in range(50)}},
        {"anyOf": [PATTERN] * 100},
        {"allOf": [{"anyOf": [{"type": "null"}] * 3}] * 4},
        {"$defs": {"a": {"properties": {"a": {"$ref": "#/$defs/a"}}}}, "$ref": "#/$defs/a"},
        {"$ref": "#/nowhere/at/all"},
        {"multipleOf": 86_400},
        {"multipleOf": 0.001},
        {"multipleOf": "x"},
    ],
)
def test_others_are_not(schema: Any) -> None:
    assert structured.json_schema(schema, param="p").kind == "json_schema"


def test_a_chain_of_refs_is_no_crash() -> None:
    links = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(499)}
    refusal({"$defs": links, "$ref": "#/$defs/d0"})


@pytest.mark.parametrize(
    "schema",
    [
        "{",
        "[" * 100_000,
        "[]",
        "3",
        {"properties": []},
        {"properties": {"a": 1}},
        {"items": "x"},
        {"anyOf": {}},
        {1: 2},
        {"const": float("nan")},
        {"const": "\ud800"},
        {"const": {1, 2}},
        {"const": [{"a": 2**53 + 1}]},
        {"maximum": -(2**60)},
        '{"const":' + "[" * 99 + "]" * 99 + "}",
    ],
)
def test_what_is_no_schema(schema: Any) -> None:
    refusal(schema)


def test_response_format() -> None:
    assert structured.response_format({"type": "text"}) is None
    assert structured.response_format({"type": "json_object"}) == Grammar(kind="json_object")
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": True, "strict": None}}
    assert structured.response_format(schema) == Grammar(kind="json_schema", text="true")


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"json": "true"}, Grammar(kind="json_schema", text="true", param="s.json")),
        ({"regex": "a"}, Grammar(kind="regex", text="a", param="s.regex")),
        ({"choice": ["a"]}, Grammar(kind="choice", text='["a"]', param="s.choice")),
        ({"grammar": "g"}, Grammar(kind="lark", text="g", param="s.grammar")),
        (
            {"json_object": True, "disable_any_whitespace": True, "disable_fallback": True},
            Grammar(kind="json_object", param="s.json_object", white_space=""),
        ),
    ],
)
def test_structured_outputs(given: dict[str, Any], wanted: Grammar) -> None:
    assert structured.structured_outputs(given, param="s") == wanted


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"json_object": False},
        {"regex": "a", "grammar": "b"},
        {"structural_tag": "x"},
        {"disable_additional_properties": True, "json": {}},
        {"json": {}, "whitespace_pattern": "x" * 300},
        "json",
    ],
)
def test_structured_outputs_refuses(given: Any) -> None:
    with pytest.raises(InvalidRequest) as error:
        structured.structured_outputs(given, param="s")
    assert str(error.value.param).startswith("s")
