"""Whatever a client sends, the answer is 200 or a 4xx in OpenAI's shape, never a fault of ours."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_serving.api import fields
from mlx_serving.api.app import create_app

JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(2**70), max_value=2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["text", "user", "assistant", "tool", "function", "1", "auto"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(max_size=4)
            | st.sampled_from(["role", "content", "type", "text", "tool_calls", "id", "name"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]) | JUNK, "content": JUNK},
    optional={name: JUNK for name in fields.MESSAGE if name not in ("role", "content")},
)


def bodies(table: fields.Table) -> st.SearchStrategy[dict[str, Any]]:
    """Mostly right requests with a few wrong fields, so that junk gets past the first check."""
    right: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "prompt": "Hi"}
    base = {name: st.just(value) for name, value in right.items() if name in table}
    wrong = st.dictionaries(st.sampled_from(sorted(table)) | st.text(max_size=6), JUNK, max_size=3)
    return st.builds(lambda a, b: {**a, **b}, st.fixed_dictionaries(base), wrong)


def answer(gateway: Any, route: str, body: bytes) -> httpx.Response:
    async def post() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(gateway))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(route, content=body)

    return asyncio.run(post())


def check(make_gateway: Any, route: str, body: bytes) -> None:
    response = answer(make_gateway(), route, body)
    assert response.status_code in (200, 400), response.text
    if response.status_code == 400:
        error = response.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert error["param"] is not None or error["code"] == "invalid_json", error


def dump(value: Any) -> bytes:
    # NaN and lone surrogates go out as Python writes them: the server has to refuse them.
    return json.dumps(value).encode()


@settings(max_examples=150, deadline=None)
@given(body=bodies(fields.CHAT))
def test_junk_fields_in_chat(make_gateway: Any, body: dict[str, Any]) -> None:
    check(make_gateway, "/v1/chat/completions", dump(body))


@settings(max_examples=150, deadline=None)
@given(body=bodies(fields.COMPLETIONS))
def test_junk_fields_in_completions(make_gateway: Any, body: dict[str, Any]) -> None:
    check(make_gateway, "/v1/completions", dump(body))


@settings(max_examples=150, deadline=None)
@given(messages=st.lists(MESSAGE, max_size=3))
def test_junk_messages(make_gateway: Any, messages: list[Any]) -> None:
    check(make_gateway, "/v1/chat/completions", dump({"messages": messages}))


@settings(max_examples=100, deadline=None)
@given(prompt=JUNK)
def test_junk_prompts(make_gateway: Any, prompt: Any) -> None:
    check(make_gateway, "/v1/completions", dump({"prompt": prompt}))


@settings(max_examples=100, deadline=None)
@given(body=st.binary(max_size=64) | JUNK.map(dump))
def test_junk_bytes(make_gateway: Any, body: bytes) -> None:
    check(make_gateway, "/v1/chat/completions", body)
