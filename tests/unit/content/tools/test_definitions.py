"""Definitions of tools, well-formed and not."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlx_serving.content.forced import forcing_grammar, guarding_grammar
from mlx_serving.content.output import choose_format
from mlx_serving.content.tools.definitions import ToolUse, held_schema, tool_use
from mlx_serving.content.tools.family import Tools
from mlx_serving.content.tools.select import FAMILIES
from mlx_serving.errors import MLXServingError, UnsupportedParameter

SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "string"}}}


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **fields}}


def test_what_templates_are_shown() -> None:
    use = tool_use([function(description="d", parameters=SCHEMA, strict=True)])
    assert use.tools == (function(description="d", parameters=SCHEMA),)
    assert use.strict_tools == ("f",)
    bare = tool_use([function()]).tools[0]["function"]
    assert bare["parameters"] == {"type": "object", "properties": {}}


def test_choices() -> None:
    tools = [function()]
    assert tool_use(tools, "none") == ToolUse() == tool_use(None) == tool_use([])
    assert tool_use(tools).tool_choice == tool_use(tools, "auto").tool_choice == "auto"
    assert tool_use(tools, "required").tool_choice == "required"
    named = {"type": "function", "function": {"name": "f"}}
    assert tool_use(tools, named).tool_choice == "=f"
    assert tool_use(tools, None, False).parallel_tool_calls is False
    assert tool_use(tools, None, True).parallel_tool_calls is True


def test_a_schema_matters_only_where_it_is_kept_to() -> None:
    odd = [function(parameters={"type": "object", "not": {}})]
    assert tool_use(odd).tools
    for held in ("required", {"type": "function", "function": {"name": "f"}}):
        with pytest.raises(UnsupportedParameter) as error:
            tool_use(odd, held)
        assert error.value.param == "tools[0].function.parameters"


def test_types_of_parameters() -> None:
    properties = {
        "plain": {"type": "string"},
        "list": {"type": ["integer", "null"]},
        "enum": {"enum": ["a", 1]},
        "const": {"const": 1},
        "any": {"anyOf": [{"type": "string"}, {"oneOf": [{"type": "null"}]}]},
        "odd": 5,
    }
    tools = Tools([function(parameters={"properties": properties})])
    found = {name: set(tools.types("f", name)) for name in (*properties, "none")}
    assert found == {
        "plain": {"string"},
        "list": {"integer", "null"},
        "enum": {"string", "other"},
        "const": {"other"},
        "any": {"string", "null"},
        "odd": set(),
        "none": set(),
    }
    assert tools.types("g", "plain") == frozenset()


KEYS = ["type", "properties", "required", "enum", "const", "items", "anyOf", "$ref", "a", "name"]
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.sampled_from(["object", "string", "a", "#", ""])
)
JUNK = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(parameters=JUNK, strict=st.booleans(), choice=st.sampled_from([None, "required"]))
@example(parameters={"required": 5}, strict=False, choice="required")
@example(parameters={"properties": {"a": {"enum": 5}}}, strict=True, choice=None)
@example(parameters={"properties": {"a": {"enum": []}}}, strict=True, choice=None)
@settings(max_examples=300, deadline=None)
def test_no_definition_breaks_anything(parameters: Any, strict: bool, choice: Any) -> None:
    if isinstance(parameters, dict):
        parameters = {"type": "object", "properties": {"a": parameters}, **parameters}
    try:
        use = tool_use([function(parameters=parameters, strict=strict)], choice)
        functions = {n: held_schema(s) for n, s in Tools(use.tools).schemas().items()}
    except MLXServingError as error:
        assert error.status == 400
        return
    Tools(use.tools).types("f", "a")
    for name in FAMILIES:
        form = choose_format("", name, "think")
        for grammar in (forcing_grammar, guarding_grammar):
            text = grammar(form, "", functions, {}.get, parallel=True, thinking=False)
            assert text is None or text.startswith("start: ")


@given(tools=JUNK, choice=JUNK)
@settings(max_examples=300, deadline=None)
def test_junk_is_refused(tools: Any, choice: Any) -> None:
    try:
        tool_use(tools, choice)
    except MLXServingError as error:
        assert error.status == 400 and error.param
