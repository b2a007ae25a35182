"""Tools of /v1/responses: functions, namespaces of functions, and searches that are never made."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from mlx_serving.types import ChatPrompt, TokenEvent, ToolCallDelta

SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}}
TOOL = {"type": "function", "name": "add", "description": "Adds.", "parameters": SCHEMA}
SUB = {"type": "function", "name": "sub", "parameters": SCHEMA}
SPACE = {"type": "namespace", "name": "math", "description": "Sums.", "tools": [TOOL, SUB]}
SEARCH = {"type": "web_search", "external_web_access": False, "search_context_size": "low"}


async def prompt_of(client: httpx.AsyncClient, gateway: Any, **body: Any) -> ChatPrompt:
    response = await client.post("/v1/responses", json={"input": "Hi", **body})
    assert response.status_code == 200, response.text
    prompt = gateway.requests[-1].prompt
    assert isinstance(prompt, ChatPrompt)
    return prompt


async def refusal(client: httpx.AsyncClient, **body: Any) -> tuple[str, str]:
    response = await client.post("/v1/responses", json={"input": "Hi", **body})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    return error["param"], error["message"]


async def test_a_namespaces_functions_are_shown_with_its_name(
    client: httpx.AsyncClient, gateway: Any
) -> None:
    prompt = await prompt_of(client, gateway, tools=[TOOL, SPACE])
    functions = [tool["function"] for tool in prompt.tools]
    assert [f["name"] for f in functions] == ["add", "math__add", "math__sub"]
    assert [f.get("description") for f in functions] == ["Adds.", "Sums.\n\nAdds.", None]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_names_its_namespace(
    client: httpx.AsyncClient, gateway: Any, stream: bool
) -> None:
    calls = [ToolCallDelta(index=0, id="c", name="math__sub", arguments='{"x": 1}')]
    event = TokenEvent(choice=0, text="", token_ids=[1], tool_calls=calls, finish_reason="stop")
    gateway.script = lambda request: [[event]]
    body = {"input": "Hi", "tools": [SPACE], "stream": stream}
    response = await client.post("/v1/responses", json=body)
    if stream:
        told = [json.loads(line[6:]) for line in response.text.splitlines() if line[:5] == "data:"]
        for one in told:
            if "item" in one:
                assert (one["item"]["namespace"], one["item"]["name"]) == ("math", "sub")
        answer = told[-1]["response"]
    else:
        answer = response.json()
    (item,) = answer["output"]
    assert (item["namespace"], item["name"], item["arguments"]) == ("math", "sub", '{"x": 1}')
    said = [
        {"type": "function_call", "call_id": "c", "arguments": "{}", "namespace": "math"}
        | {"name": "sub"},
        {"type": "function_call_output", "call_id": "c", "output": "0"},
    ]
    by_hand = await prompt_of(client, gateway, tools=[SPACE], input=said)
    assert by_hand.messages[0].tool_calls[0]["function"]["name"] == "math__sub"
    stored = await prompt_of(
        client, gateway, tools=[SPACE], previous_response_id=answer["id"], input=said[1:]
    )
    assert stored.messages[1].tool_calls[0]["function"]["name"] == "math__sub"


async def test_a_search_is_never_made(client: httpx.AsyncClient, gateway: Any) -> None:
    response = await client.post("/v1/responses", json={"input": "Hi", "tools": [SEARCH, TOOL]})
    assert response.headers["x-mlx-serving-advisory"] == "tools[0]"
    assert [t["function"]["name"] for t in gateway.requests[-1].prompt.tools] == ["add"]
    assert response.json()["tools"] == [SEARCH, {"strict": False, **TOOL}]
    for choice in ("required", {"type": "web_search"}):
        param, _ = await refusal(client, tools=[SEARCH], tool_choice=choice)
        assert param.startswith("tool_choice")


@pytest.mark.parametrize(
    ("tools", "param"),
    [
        ([{"type": "code_interpreter"}], "tools[0].type"),
        ([{"type": "namespace", "name": "n"}], "tools[0].tools"),
        ([{"type": "namespace", "tools": []}], "tools[0].name"),
        ([SEARCH, SPACE | {"tools": [{"type": "custom", "name": "x"}]}], "tools[1].tools[0].type"),
        ([SEARCH, SPACE | {"tools": [SUB, {"type": "function"}]}], "tools[1].tools[1].name"),
        ([SEARCH, SPACE | {"tools": [SUB, TOOL | {"name": "a b"}]}], "tools[1].tools[1].name"),
        ([SEARCH, SPACE | {"tools": [TOOL | {"mood": 1}]}], "tools[1].tools[0].mood"),
        ([SPACE, TOOL | {"name": "math__add"}], "tools[1].name"),
        ([SPACE | {"tools": [TOOL] * 129}], "tools[0].tools"),
        ([SPACE, TOOL | {"parameters": {"type": "array"}}], "tools[1].parameters"),
    ],
)
async def test_what_is_wrong_is_named(client: httpx.AsyncClient, tools: Any, param: str) -> None:
    named, message = await refusal(client, tools=tools)
    assert named == param
    assert f"'{param}" in message or "two tools" in message or "missing" in message


@pytest.mark.parametrize(
    ("choice", "wanted"),
    [
        ("auto", (3, "auto")),
        ("required", (3, "required")),
        ({"type": "function", "name": "math__add"}, (3, "=math__add")),
        ({"type": "function", "name": "sub"}, (3, "=math__sub")),
        ("none", (0, "auto")),
    ],
)
async def test_choices_of_tools(
    client: httpx.AsyncClient, gateway: Any, choice: Any, wanted: Any
) -> None:
    prompt = await prompt_of(client, gateway, tools=[TOOL, SPACE], tool_choice=choice)
    assert (len(prompt.tools), prompt.tool_choice) == wanted


async def test_strict_tools(client: httpx.AsyncClient, gateway: Any) -> None:
    inside = SPACE | {"tools": [TOOL | {"strict": True}]}
    prompt = await prompt_of(client, gateway, tools=[TOOL | {"strict": True}, inside])
    assert prompt.strict_tools == ("add", "math__add")
