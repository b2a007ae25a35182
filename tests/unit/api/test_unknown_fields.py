"""Fields that nobody knows: refused, or with `unknown_fields: warn` left out and named in a header."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

USER = [{"role": "user", "content": [{"type": "text", "text": "Hi", "mood": 1}]}]
ITEM = {"type": "message", "role": "user", "content": "Hi", "mood": 1}
BODIES: dict[str, tuple[dict[str, Any], str]] = {
    "/v1/chat/completions": (
        {"messages": USER, "mood": 1, "stream_options": {"x": 1}, "stream": True},
        "mood, stream_options.x, messages[0].content[0].mood",
    ),
    "/v1/completions": ({"prompt": "Hi", "mood": None}, "mood"),
    "/v1/responses": ({"input": [ITEM], "mood": 1}, "mood, input[0].mood"),
    "/v1/messages": (
        {"messages": USER, "max_tokens": 9, "mood": 1},
        "mood, messages[0].content[0].mood",
    ),
    "/v1/messages/count_tokens": (
        {"messages": USER, "mood": 1},
        "mood, messages[0].content[0].mood",
    ),
    "/api/chat": (
        {"messages": [{"role": "user", "content": "Hi", "mood": 1}], "options": {"mood": 1}},
        "options.mood, messages[0].mood",
    ),
    "/tokenize": ({"prompt": "Hi", "mood": 1}, "mood"),
    "/v1/embeddings": ({"input": "Hi", "mood": 1}, "mood"),
}
IGNORED = "x-mlx-serving-ignored"
HI = [{"role": "user", "content": "Hi"}]
SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "string"}}}
FORMAT = {"type": "json_schema", "schema": SCHEMA, "mood": 1}
FUNCTION = {"name": "f", "parameters": SCHEMA, "mood": 1}
TOOL = {"type": "function", "function": FUNCTION, "mood": 1}
CHOICE = {"type": "function", "function": {"name": "f", "mood": 1}, "mood": 1}
CALL = {
    "type": "function",
    "id": "c",
    "function": {"name": "f", "arguments": "{}", "mood": 1},
    "mood": 1,
}
NESTED: list[tuple[str, dict[str, Any], list[str]]] = [
    (
        "/v1/chat/completions",
        {"messages": HI, "tools": [TOOL], "tool_choice": CHOICE},
        ["tools[0].mood", "tools[0].function.mood", "tool_choice.mood", "tool_choice.function.mood"],
    ),
    (
        "/v1/chat/completions",
        {"messages": [*HI, {"role": "assistant", "tool_calls": [CALL]}, *HI]},
        ["messages[1].tool_calls[0].mood", "messages[1].tool_calls[0].function.mood"],
    ),
    (
        "/v1/chat/completions",
        {"messages": HI, "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA, "mood": 1}, "mood": 1}},
        ["response_format.mood", "response_format.json_schema.mood"],
    ),
    (
        "/v1/chat/completions",
        {"messages": HI, "structured_outputs": {"regex": "a+", "mood": 1}},
        ["structured_outputs.mood"],
    ),
    (
        "/v1/responses",
        {
            "input": [{"role": "user", "content": [{"type": "input_text", "text": "Hi", "mood": 1}]}],
            "tools": [{"type": "function", **FUNCTION}],
            "tool_choice": {"type": "function", "name": "f", "mood": 1},
        },
        ["input[0].content[0].mood", "tools[0].mood", "tool_choice.mood"],
    ),
    ("/v1/responses", {"input": "Hi", "text": {"format": FORMAT}}, ["text.format.mood"]),
    (
        "/v1/messages",
        {
            "messages": [{"role": "user", "content": "Hi", "mood": 1}],
            "max_tokens": 9,
            "tools": [{"name": "f", "input_schema": SCHEMA, "mood": 1}],
            "tool_choice": {"type": "tool", "name": "f", "mood": 1},
        },
        ["messages[0].mood", "tools[0].mood", "tool_choice.mood"],
    ),
    (
        "/v1/messages",
        {"messages": HI, "max_tokens": 9, "output_config": {"format": FORMAT}},
        ["output_config.format.mood"],
    ),
    (
        "/api/chat",
        {"messages": [*HI, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}, "mood": 1}, "mood": 1}]}, *HI], "tools": [TOOL]},
        ["tools[0].mood", "tools[0].function.mood", "messages[1].tool_calls[0].mood", "messages[1].tool_calls[0].function.mood"],
    ),
    ("/v1/rerank", {"query": "Hi", "documents": [{"text": "a", "mood": 1}]}, ["documents[0].mood"]),
]  # fmt: skip


@pytest.mark.parametrize("path", BODIES)
async def test_unknown_fields(
    client: httpx.AsyncClient, relaxed: httpx.AsyncClient, path: str
) -> None:
    body, named = BODIES[path]
    refused = await client.post(path, json=body)
    assert refused.status_code == 400 and IGNORED not in refused.headers
    assert "unknown_parameter" in refused.text
    answered = await relaxed.post(path, json=body)
    assert answered.status_code == 200, answered.text
    assert sorted(answered.headers[IGNORED].split(", ")) == sorted(named.split(", "))


@pytest.mark.parametrize(("path", "body", "named"), NESTED)
async def test_unknown_fields_inside_objects(
    client: httpx.AsyncClient,
    relaxed: httpx.AsyncClient,
    path: str,
    body: dict[str, Any],
    named: list[str],
) -> None:
    refused = await client.post(path, json=body)
    assert refused.status_code == 400 and IGNORED not in refused.headers
    assert "Unknown field" in refused.text
    assert any(f"'{name}'" in refused.text for name in named), refused.text
    answered = await relaxed.post(path, json=body)
    assert answered.status_code == 200, answered.text
    assert sorted(answered.headers[IGNORED].split(", ")) == sorted(named)


async def test_what_is_known_is_not_relaxed(relaxed: httpx.AsyncClient) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    clean = await relaxed.post("/v1/chat/completions", json=body)
    assert clean.status_code == 200 and IGNORED not in clean.headers
    for wrong in ({"best_of": 3}, {"temperature": 9}):
        response = await relaxed.post("/v1/chat/completions", json=body | wrong)
        assert response.status_code == 400


async def test_names_in_the_header_are_bounded_and_clean(relaxed: httpx.AsyncClient) -> None:
    body = {"prompt": "Hi", "é\r\nset-cookie: x,": 1} | {f"{i}" + "x" * 500: 1 for i in range(50)}
    response = await relaxed.post("/v1/completions", json=body)
    assert response.status_code == 200
    names = response.headers[IGNORED].split(", ")
    assert len(names) == 20 and names[0] == "???set-cookie:?x?"
    assert max(map(len, names)) <= 100
