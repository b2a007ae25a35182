"""/tokenize, /detokenize, and cancelling a request from outside."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from mlx_serving.api import tokens_fields as fields
from mlx_serving.errors import Cancelled
from mlx_serving.types import ChatPrompt, TextPrompt, TokenEvent

USER = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


async def test_a_prompt(client: httpx.AsyncClient, gateway: Any) -> None:
    body = (await client.post("/tokenize", json={"prompt": "Hi"})).json()
    assert body == {"count": 2, "max_model_len": 8192, "tokens": [72, 105], "token_strs": None}
    back = await client.post("/detokenize", json={"model": "small", "tokens": body["tokens"]})
    assert back.json() == {"prompt": "Hi"}
    await client.post("/tokenize", json={"prompt": "Hi", "add_special_tokens": False})
    assert [prompt for _, prompt in gateway.prompts] == [
        TextPrompt(text="Hi"),
        TextPrompt(text="Hi", add_special_tokens=False),
    ]


async def test_a_chat_is_what_completions_would_see(
    client: httpx.AsyncClient, gateway: Any
) -> None:
    for more in (
        {},
        {"chat_template_kwargs": {"x": 1}},
        {"add_generation_prompt": False},
        {"continue_final_message": True},
    ):
        body = {"messages": USER, **more}
        assert (await client.post("/tokenize", json=body)).json()["count"] == 2
        await client.post("/v1/chat/completions", json=body)
        assert gateway.prompts[-1] == ("tiny", gateway.requests[-1].prompt)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": USER}, "prompt"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/tokenize", {"prompt": "x", "tools": []}, "tools"),
        ("/tokenize", {"prompt": "x", "add_generation_prompt": True}, "add_generation_prompt"),
        ("/tokenize", {"messages": [{"role": "wizard"}]}, "messages[0].role"),
        ("/tokenize", {"messages": USER, "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"prompt": "x", "mood": 1}, "mood"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
        ("/detokenize", {"tokens": [1], "mood": 1}, "mood"),
    ],
)
async def test_refusals_name_the_field(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], param: str
) -> None:
    response = await client.post(path, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    "field", [f for f in fields.TOKENIZE.values() if f.disposition == "refused"]
)
async def test_refused_fields(client: httpx.AsyncClient, field: Any) -> None:
    body = {"prompt": "x", field.name: {"a": 1}}
    error = (await client.post("/tokenize", json=body)).json()["error"]
    assert (error["param"], error["code"]) == (field.name, "unsupported_parameter")
    for neutral in (None, *field.neutral):
        body = {"prompt": "x", field.name: neutral}
        assert (await client.post("/tokenize", json=body)).status_code == 200


async def test_a_model_that_is_not_served(client: httpx.AsyncClient) -> None:
    response = await client.post("/tokenize", json={"prompt": "x", "model": "nope"})
    assert response.status_code == 404


ROUTES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": USER}),
    ("/v1/completions", {"prompt": ["a", "b"]}),
    ("/v1/responses", {"input": "Hi"}),
    ("/v1/messages", {"messages": USER, "max_tokens": 9}),
    ("/api/chat", {"messages": USER, "stream": False}),
]


@pytest.mark.parametrize(("path", "body"), ROUTES)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("by", ["x-request-id", "id"])
async def test_cancelling(
    client: httpx.AsyncClient, gateway: Any, path: str, body: Any, stream: bool, by: str
) -> None:
    gateway.script = lambda request: [
        [TokenEvent(choice=0, text="x", token_ids=[1])],
        "hang",
        Cancelled("Cancelled."),
    ]
    body = body | {"stream": stream}
    answer = asyncio.ensure_future(client.post(path, json=body, headers={"x-request-id": "mine"}))
    while not gateway.generations:  # noqa: ASYNC110 - nothing signals it
        await asyncio.sleep(0)
    await asyncio.sleep(0.01)
    own = gateway.generations[0].request_id.removesuffix("-0")
    wanted = "mine" if by == "x-request-id" else own
    cancelled = await client.post(f"/v1/requests/{wanted}/cancel")
    assert cancelled.json() == {"id": wanted, "object": "request", "cancelled": True}
    response = await asyncio.wait_for(answer, 5)
    assert response.status_code == (200 if stream else 499)
    assert all(generation.ended for generation in gateway.generations)
    assert (await client.post(f"/v1/requests/{wanted}/cancel")).status_code == 404


async def test_nothing_to_cancel(client: httpx.AsyncClient) -> None:
    itself = {"x-request-id": "mine"}
    response = await client.post("/v1/requests/mine/cancel", headers=itself)
    assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")
    assert (await client.post("/v1/requests/mine")).status_code == 404
    assert (await client.get("/v1/requests/mine/cancel")).status_code == 405


async def test_tools_count(client: httpx.AsyncClient, gateway: Any) -> None:
    response = await client.post("/tokenize", json={"messages": USER, "tools": [TOOL]})
    assert response.status_code == 200
    prompt = gateway.prompts[-1][1]
    assert isinstance(prompt, ChatPrompt) and len(prompt.tools) == 1
