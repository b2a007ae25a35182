"""The tools of a request and what is to be done with them, in OpenAI's words: checked and bounded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from mlx_serving.content import structured
from mlx_serving.errors import InvalidRequest, UnsupportedParameter
from mlx_serving.unknown import refuse_others

MAX_TOOLS = 128
MAX_SCHEMA_CHARS = 65_536
"""Of one function's parameters as JSON."""
MAX_CHARS = 1_048_576
"""Of all tools as JSON."""
MAX_DEPTH = 64
"""Of the JSON of a function's parameters."""
MAX_DESCRIPTION_CHARS = 65_536
_NAME = re.compile(r"[a-zA-Z0-9_.:-]{1,128}")
_FUNCTION_KEYS = frozenset({"name", "description", "parameters", "strict"})
_NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}}


class ToolUse(msgspec.Struct, frozen=True, kw_only=True):
    """Fields of `ChatPrompt`. No `tools` where none may be called."""

    tools: tuple[Mapping[str, Any], ...] = ()
    tool_choice: str = "auto"
    strict_tools: tuple[str, ...] = ()
    parallel_tool_calls: bool = True


def tool_use(tools: Any, choice: Any = None, parallel: bool | None = None) -> ToolUse:
    """Check `tools`, `tool_choice` and `parallel_tool_calls`; None: not given.

    Raises InvalidRequest or UnsupportedParameter, naming the field.
    """
    if tools is None:
        tools = []
    if not isinstance(tools, list | tuple):
        raise InvalidRequest("'tools' must be an array.", param="tools")
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest(f"'tools' has over {MAX_TOOLS} tools.", param="tools")
    checked = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools)]
    names = [tool["function"]["name"] for tool, _ in checked]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise InvalidRequest(
                f"'{name}' is the name of two tools.", param=f"tools[{i}].function.name"
            )
    if sum(len(msgspec.json.encode(tool)) for tool, _ in checked) > MAX_CHARS:
        raise InvalidRequest(f"'tools' is over {MAX_CHARS} characters.", param="tools")
    chosen = _choice(choice, names)
    if chosen == "none":
        return ToolUse()
    wanted = tuple(tool for tool, _ in checked)
    strict = tuple(tool["function"]["name"] for tool, strict in checked if strict)
    if chosen != "auto" or strict:
        held = names if chosen == "required" else strict if chosen == "auto" else (chosen[1:],)
        _check_schemas(wanted, held)
    return ToolUse(
        tools=wanted,
        tool_choice=chosen,
        strict_tools=strict,
        parallel_tool_calls=parallel is not False,
    )


def held_schema(parameters: Mapping[str, Any], *, param: str = "tools") -> dict[str, Any]:
    """A function's parameters as a grammar follows them. Raises UnsupportedParameter for a keyword
    that is not followed."""
    text = structured.json_schema(parameters or _NO_PARAMETERS, param=param).text
    schema: dict[str, Any] = msgspec.json.decode(text)
    return schema


def _check_schemas(tools: tuple[Mapping[str, Any], ...], held: Any) -> None:
    for i, tool in enumerate(tools):
        if tool["function"]["name"] in held:
            param = f"tools[{i}].function.parameters"
            held_schema(tool["function"]["parameters"], param=param)


def _tool(tool: Any, at: str) -> tuple[Mapping[str, Any], bool]:
    """The tool as templates expect it, and whether it is strict."""
    if not isinstance(tool, Mapping):
        raise InvalidRequest(f"'{at}' must be an object.", param=at)
    if tool.get("type", "function") != "function":
        raise UnsupportedParameter(
            f"'{at}.type' must be 'function': the server runs no tools of its own.",
            param=f"{at}.type",
        )
    function = tool.get("function")
    if not isinstance(function, Mapping):
        raise InvalidRequest(f"'{at}.function' must be an object.", param=f"{at}.function")
    refuse_others(tool, ("type", "function"), at + ".")
    at += ".function"
    refuse_others(function, _FUNCTION_KEYS, at + ".")
    name, described, strict = (function.get(key) for key in ("name", "description", "strict"))
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"'{at}.name' must be 1 to 128 letters, digits, '_', '.', ':' or '-'.",
            param=f"{at}.name",
        )
    if described is not None and not isinstance(described, str):
        raise InvalidRequest(f"'{at}.description' must be text.", param=f"{at}.description")
    if described is not None and len(described) > MAX_DESCRIPTION_CHARS:
        raise InvalidRequest(
            f"'{at}.description' is over {MAX_DESCRIPTION_CHARS} characters.",
            param=f"{at}.description",
        )
    if strict is not None and not isinstance(strict, bool):
        raise InvalidRequest(f"'{at}.strict' must be true or false.", param=f"{at}.strict")
    shown: dict[str, Any] = {"name": name}
    if described is not None:
        shown["description"] = described
    shown["parameters"] = _parameters(function.get("parameters"), f"{at}.parameters")
    return {"type": "function", "function": shown}, bool(strict)


def _parameters(schema: Any, at: str) -> Mapping[str, Any]:
    if schema is None:
        return _NO_PARAMETERS
    if not isinstance(schema, Mapping) or schema.get("type", "object") != "object":
        raise InvalidRequest(f"'{at}' must be the schema of an object.", param=at)
    if _deeper(schema, MAX_DEPTH):
        raise InvalidRequest(f"'{at}' is over {MAX_DEPTH} levels deep.", param=at)
    if len(msgspec.json.encode(schema)) > MAX_SCHEMA_CHARS:
        raise InvalidRequest(f"'{at}' is over {MAX_SCHEMA_CHARS} characters.", param=at)
    if not isinstance(schema.get("properties", {}), Mapping):
        raise InvalidRequest(f"'{at}.properties' must be an object.", param=f"{at}.properties")
    return schema


def _deeper(value: Any, levels: int) -> bool:
    if not isinstance(value, Mapping | list):
        return False
    if levels == 0:
        return True
    items = value.values() if isinstance(value, Mapping) else value
    return any(_deeper(item, levels - 1) for item in items)


def _choice(choice: Any, names: list[str]) -> str:
    """`auto`, `none`, `required` or `=NAME`."""
    if choice is None:
        return "auto"
    if isinstance(choice, str):
        if choice not in ("auto", "none", "required"):
            raise InvalidRequest(
                "'tool_choice' must be auto, none, required or a function.", param="tool_choice"
            )
        if choice == "required" and not names:
            raise InvalidRequest("'tool_choice' requires a call of no tools.", param="tool_choice")
        return choice
    if not isinstance(choice, Mapping):
        raise InvalidRequest("'tool_choice' must be text or an object.", param="tool_choice")
    if choice.get("type") != "function":
        raise UnsupportedParameter(
            "'tool_choice.type' must be 'function'.", param="tool_choice.type"
        )
    refuse_others(choice, ("type", "function"), "tool_choice.")
    function = choice.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or name not in names:
        raise InvalidRequest(
            "'tool_choice.function.name' is none of the tools' names.",
            param="tool_choice.function.name",
        )
    refuse_others(choice["function"], ("name",), "tool_choice.function.")
    return "=" + name
