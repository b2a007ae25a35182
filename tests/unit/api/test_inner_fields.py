"""Every table of fields has its tests: here those of what is inside a body, and of the smaller routes.

A honoured field, changed, changes what is asked of the gateway, or the answer; an advisory one
changes nothing; a refused one is named, unless its value asks for nothing; any other is unknown.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import httpx
import msgspec
import ollama
import pytest
from openai.types import chat, shared_params

from mlx_serving.api import fields
from unit.api.places import HI, MARK, PLACES, Path_, Place

ELSEWHERE: dict[str, str] = {
    "/v1/chat/completions": "test_api_fields.py::test_chat_honours",
    "/v1/completions": "test_api_fields.py::test_completions_honour",
    "/v1/responses": "test_responses_fields.py::test_honoured",
    "/v1/messages": "test_anthropic_fields.py::test_honoured",
    "/api/chat": "test_ollama_fields.py::test_honoured",
    "/api/generate": "test_ollama_fields.py::test_honoured",
    "/api/chat and /api/generate options": "test_ollama_fields.py::test_options_honoured",
}
"""Tables whose fields are enumerated by a test of their dialect's."""
FIELDS_ELSEWHERE: dict[tuple[str, str], str] = {
    ("stream_options", "include_usage"): "test_api_shapes.py::test_golden_completion_stream_with_usage",
    ("structured_outputs", "regex"): "test_the_other_structured_outputs",
    ("structured_outputs", "choice"): "test_the_other_structured_outputs",
    ("structured_outputs", "grammar"): "test_the_other_structured_outputs",
    ("structured_outputs", "json_object"): "test_the_other_structured_outputs",
    ("/v1/messages thinking", "display"): "test_anthropic_shapes.py::test_thinking_may_be_omitted",
}  # fmt: skip
"""Honoured fields that cannot be changed alone, or show in the answer only."""
PURE = ("/v1/embeddings", "/v1/rerank", "/v2/rerank", "/rerank", "/detokenize")
"""Routes whose answers are the same for the same question but for their ids."""


def inside(body: Any, path: Path_) -> dict[str, Any]:
    for step in path:
        body = body[step]
    return body  # type: ignore[no-any-return]


def spelled(path: Path_) -> str:
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.removeprefix(".")


def parts(place: Place, name: str) -> str:
    return spelled((*place.at, name))


def of(disposition: str) -> list[Any]:
    return [
        pytest.param(route, field, id=f"{route} {field.name}")
        for route, place in PLACES.items()
        for field in fields.ROUTES[route].values()
        if field.disposition == disposition and place is not None
    ]


async def asked(client: httpx.AsyncClient, gateway: Any, place: Place, **more: Any) -> Any:
    """What a body with other fields in its place asks for: of the gateway, and in the answer where
    that tells; or the field that its refusal names."""
    body = copy.deepcopy(place.body)
    inside(body, place.at).update(more)
    for seen in (gateway.requests, gateway.pooled, gateway.prompts, gateway.loads):
        seen.clear()
    response = await client.post(place.path, json=body)
    if response.status_code != 200:
        assert response.status_code in (400, 404), response.text
        wrong = response.json()
        return (wrong if "param" in wrong else wrong["error"])["param"]
    requests = [
        msgspec.structs.replace(r, request_id="") for r in (*gateway.requests, *gateway.pooled)
    ]
    answer = re.sub(r'"id":"[^"]*"', "", response.text) if place.path in PURE else ""
    return (requests, list(gateway.prompts), list(gateway.loads), answer)


def test_every_table_is_enumerated() -> None:
    assert PLACES.keys() | ELSEWHERE.keys() == fields.ROUTES.keys()
    assert not PLACES.keys() & ELSEWHERE.keys()
    for route, place in PLACES.items():
        honoured = {f.name for f in fields.ROUTES[route].values() if f.disposition == "honoured"}
        elsewhere = {name for table, name in FIELDS_ELSEWHERE if table == route}
        assert place.changed.keys() | elsewhere == honoured, route


def test_the_tests_that_are_named_are_there() -> None:
    """Also those that the dialects' own lists name."""
    folder = Path(__file__).parent
    named = {*ELSEWHERE.values(), *FIELDS_ELSEWHERE.values()}
    for file in folder.glob("test_*_fields.py"):
        listed = re.search(r"^ELSEWHERE.*?^}", file.read_text(), re.DOTALL | re.MULTILINE)
        if listed and file.name != Path(__file__).name:
            found = re.findall(r': "([^"]*)"', listed[0])
            assert found and all("::" in one for one in found), file
            named |= set(found)
    for name in named:
        file, _, test = name.rpartition("::")
        text = (folder / (file or Path(__file__).name)).read_text()
        assert re.search(rf"^(async )?def {test}\(", text, re.MULTILINE), name


@pytest.mark.parametrize(
    ("route", "name"), [(route, name) for route in PLACES for name in PLACES[route].changed]
)
async def test_honoured(client: httpx.AsyncClient, gateway: Any, route: str, name: str) -> None:
    place = PLACES[route]
    before = await asked(client, gateway, place)
    assert not isinstance(before, str), before
    after = await asked(client, gateway, place, **{name: place.changed[name]})
    assert after != before
    if isinstance(after, str):
        whole = parts(place, name)
        assert after.startswith(spelled(place.at)) or whole.startswith(after), (after, whole)


@pytest.mark.parametrize(("route", "field"), of("advisory"))
async def test_advisory(client: httpx.AsyncClient, gateway: Any, route: str, field: Any) -> None:
    place = PLACES[route]
    value = FITTING.get(f"{route} {field.name}", FITTING.get(field.name, MARK))
    after = await asked(client, gateway, place, **{field.name: value})
    assert after == await asked(client, gateway, place)
    assert not isinstance(after, str), after


FITTING: dict[str, Any] = {
    "index": 0,
    "strict": False,
    "name": "n",
    "description": "d",
    "options": {},
    "disable_fallback": True,
    "/v1/responses web_search in tools[] type": "web_search",
    "/api/chat messages[].tool_calls[] type": "function",
}
"""Values of advisory fields that have a type."""


@pytest.mark.parametrize(("route", "field"), of("refused"))
async def test_refused(client: httpx.AsyncClient, gateway: Any, route: str, field: Any) -> None:
    place = PLACES[route]
    named = await asked(client, gateway, place, **{field.name: {"asks": "for it"}})
    assert named == parts(place, field.name)
    before = await asked(client, gateway, place)
    for neutral in (None, *field.neutral):
        assert await asked(client, gateway, place, **{field.name: neutral}) == before


@pytest.mark.parametrize("route", PLACES)
async def test_unknown(client: httpx.AsyncClient, gateway: Any, route: str) -> None:
    place = PLACES[route]
    assert await asked(client, gateway, place, mood=1) == parts(place, "mood")


@pytest.mark.parametrize(
    ("params", "route"),
    [
        (chat.ChatCompletionStreamOptionsParam, "stream_options"),
        (chat.ChatCompletionAssistantMessageParam, "messages[]"),
        (chat.ChatCompletionToolMessageParam, "messages[]"),
        (chat.ChatCompletionUserMessageParam, "messages[]"),
        (chat.ChatCompletionContentPartTextParam, "messages[].content[]"),
        (chat.ChatCompletionMessageFunctionToolCallParam, "messages[].tool_calls[]"),
        (chat.ChatCompletionFunctionToolParam, "tools[]"),
        (shared_params.FunctionDefinition, "tools[].function"),
        (chat.ChatCompletionNamedToolChoiceParam, "tool_choice"),
        (shared_params.ResponseFormatJSONSchema, "response_format"),
        (shared_params.response_format_json_schema.JSONSchema, "response_format.json_schema"),
        (ollama.Message.ToolCall, "/api/chat messages[].tool_calls[]"),
        (ollama.Message.ToolCall.Function, "/api/chat messages[].tool_calls[].function"),
        (ollama.Tool, "tools[]"),
        (ollama.Tool.Function, "tools[].function"),
    ],
)
def test_every_field_of_the_clients_has_a_disposition(params: Any, route: str) -> None:
    """Those of the other dialects are held to theirs in their own files."""
    assert set(params.__annotations__) <= fields.ROUTES[route].keys()


@pytest.mark.parametrize(
    ("name", "value"),
    [("regex", "a+"), ("choice", ["a"]), ("grammar", 'start: "a"'), ("json_object", True)],
)
async def test_the_other_structured_outputs(
    client: httpx.AsyncClient, gateway: Any, name: str, value: Any
) -> None:
    body = {"messages": HI, "structured_outputs": {name: value}}
    assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    assert gateway.requests[-1].grammar.param == f"structured_outputs.{name}"
