"""Whatever a client sends in another dialect, the answer is 200 or a 4xx that names its field."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_serving.api import fields
from mlx_serving.api.app import create_app

USER = [{"role": "user", "content": "Hi"}]
RIGHT: dict[str, dict[str, Any]] = {
    "/v1/responses": {"input": "Hi"},
    "/v1/messages": {"messages": USER, "max_tokens": 9},
    "/v1/messages/count_tokens": {"messages": USER},
    "/api/chat": {"messages": USER},
    "/api/generate": {"prompt": "Hi"},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [72]},
}
WORDS = [
    *("role", "content", "type", "text", "id", "name", "input", "function", "arguments", "output"),
    *("call_id", "tool_calls", "tool_use_id", "is_error", "format", "schema", "effort", "edits"),
    *("parameters", "input_schema", "strict", "summary", "options", "keep", "json_schema"),
]
SAID = [
    *("text", "user", "assistant", "tool", "function", "tool_use", "tool_result", "thinking"),
    *("message", "function_call", "function_call_output", "reasoning", "input_text", "json"),
    *("auto", "any", "json_schema", "enabled", "1"),
]
JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(min_value=-(2**70), max_value=2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(SAID),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=4) | st.sampled_from(WORDS), inner, max_size=4)
    ),
    max_leaves=10,
)


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """Mostly right requests with a few wrong fields, so that junk gets past the first check."""
    route = draw(st.sampled_from(sorted(RIGHT)))
    names = st.sampled_from(sorted(fields.ROUTES[route])) | st.text(max_size=6)
    return route, RIGHT[route] | draw(st.dictionaries(names, JUNK, max_size=3))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(request=requests())
def test_junk(make_gateway: Any, request: tuple[str, dict[str, Any]]) -> None:
    route, body = request

    async def post() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(make_gateway()))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(route, content=json.dumps(body).encode())

    response = asyncio.run(post())
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code == 200:
        return
    told = response.json()
    error = told if route.startswith("/api/") else told["error"]
    assert error["param"] is not None or error["code"] == "invalid_json", error
    if response.status_code == 404:
        assert error["code"] == "model_not_found"


@pytest.mark.parametrize("route", RIGHT)
@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff", b'{"a": 1e999}', b"[" * 5000])
async def test_bodies_that_are_no_objects(
    client: httpx.AsyncClient, route: str, body: bytes
) -> None:
    response = await client.post(route, content=body)
    assert response.status_code == 400
