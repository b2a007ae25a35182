"""The tables of what is inside tools, formats and earlier calls, and what the parser makes of them."""

from __future__ import annotations

import copy
from typing import Any

import httpx
import pytest

from mlx_serving.api import inner_fields

SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "string"}}}
BODY: dict[str, Any] = {
    "messages": [
        {
            "role": "user",
            "content": [
                {
                    "type": "text",
                    "text": "Hi",
                    "cache_control": {"type": "ephemeral"},
                    "prompt_cache_breakpoint": {},
                }
            ],
        },
        {
            "role": "assistant",
            "tool_calls": [
                {
                    "id": "c",
                    "index": 0,
                    "type": "function",
                    "function": {"name": "f", "arguments": "{}"},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "c", "content": "1"},
    ],
    "tools": [
        {
            "type": "function",
            "function": {"name": "f", "description": "d", "parameters": SCHEMA, "strict": True},
        }
    ],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
}
FORMAT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Hi"}],
    "response_format": {
        "type": "json_schema",
        "json_schema": {"schema": SCHEMA, "name": "n", "description": "d", "strict": False},
    },
}
OUTPUTS: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Hi"}],
    "structured_outputs": {
        "json": SCHEMA,
        "disable_any_whitespace": False,
        "whitespace_pattern": " ?",
        "disable_fallback": True,
    },
}
ONE_OF = {"regex": "a+", "choice": ["a"], "grammar": 'start: "a"', "json_object": True}
"""Beside `json`: one of them at a time."""
PLACES: dict[str, tuple[dict[str, Any], tuple[str | int, ...]]] = {
    "messages[].content[]": (BODY, ("messages", 0, "content", 0)),
    "messages[].tool_calls[]": (BODY, ("messages", 1, "tool_calls", 0)),
    "tools[]": (BODY, ("tools", 0)),
    "tools[].function": (BODY, ("tools", 0, "function")),
    "tool_choice": (BODY, ("tool_choice",)),
    "response_format": (FORMAT, ("response_format",)),
    "response_format.json_schema": (FORMAT, ("response_format", "json_schema")),
    "structured_outputs": (OUTPUTS, ("structured_outputs",)),
}


def inside(body: Any, path: tuple[str | int, ...]) -> dict[str, Any]:
    for step in path:
        body = body[step]
    return body  # type: ignore[no-any-return]


@pytest.mark.parametrize("route", inner_fields.ROUTES)
async def test_the_parser_knows_the_table_and_nothing_else(
    client: httpx.AsyncClient, route: str
) -> None:
    body, path = PLACES[route]
    known = inside(body, path).keys() | (ONE_OF.keys() if route == "structured_outputs" else set())
    assert known == inner_fields.ROUTES[route].keys()
    taken = await client.post("/v1/chat/completions", json=body)
    assert taken.status_code == 200, taken.text
    odd = copy.deepcopy(body)
    inside(odd, path)["mood"] = 1
    refused = await client.post("/v1/chat/completions", json=odd)
    assert refused.status_code == 400
    at = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    assert refused.json()["error"]["param"] == at.removeprefix(".") + ".mood"
    assert refused.json()["error"]["code"] == "unknown_parameter"


@pytest.mark.parametrize("name", ONE_OF)
async def test_the_other_structured_outputs(client: httpx.AsyncClient, name: str) -> None:
    body = OUTPUTS | {"structured_outputs": {name: ONE_OF[name]}}
    taken = await client.post("/v1/chat/completions", json=body)
    assert taken.status_code == 200, taken.text
