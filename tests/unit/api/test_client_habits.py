"""What clients are used to send elsewhere, as the trackers of other servers tell; and Open WebUI's
requests, to a server that it takes for OpenAI's and to one that it takes for Ollama."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from mlx_serving.types import TokenEvent

HI = [{"role": "user", "content": "Hi"}]
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    "path", ["//v1/models", "/v1//models", "/v1/models/", "/v1/models//tiny", "/v1/models/tiny/"]
)
async def test_slashes_too_many(client: httpx.AsyncClient, path: str) -> None:
    assert (await client.get(f"http://test{path}")).status_code == 200


@pytest.mark.parametrize("path", ["/chat/completions", "/v1/v1/chat/completions"])
async def test_a_wrong_base_url_is_told(client: httpx.AsyncClient, path: str) -> None:
    answer = await client.post(path, json={"messages": HI})
    assert answer.status_code == 404
    assert "did you mean '/v1/chat/completions'?" in answer.json()["error"]["message"]


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
async def test_minus_one_is_what_the_context_leaves(chat: Any, name: str) -> None:
    assert (await chat.request_of(**{name: -1})).max_tokens == 2**31 - 1
    for wrong in (0, -2):
        answer = await chat.post(**{name: wrong})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)
    assert (await chat.completion_request_of(max_tokens=-1)).max_tokens == 2**31 - 1


async def test_no_logprobs_of_none(chat: Any) -> None:
    for asked in ({"top_logprobs": 0}, {"logprobs": False, "top_logprobs": 0}):
        assert (await chat.request_of(**asked)).sampling.logprobs is None


@pytest.mark.parametrize(
    ("said", "content"),
    [
        ({"role": "assistant", "content": None}, ""),
        ({"role": "assistant", "content": None, "reasoning_content": "Hm."}, ""),
        ({"role": "assistant", "content": None, "tool_calls": []}, ""),
        ({"role": "assistant", "tool_calls": [CALL]}, None),
        ({"role": "tool", "tool_call_id": "c", "content": []}, ""),
    ],
)
async def test_nothing_said(chat: Any, said: dict[str, Any], content: str | None) -> None:
    request = await chat.request_of(messages=[*HI, said, *HI])
    assert request.prompt.messages[1].content == content


async def test_what_matters_only_over_the_context(client: httpx.AsyncClient) -> None:
    """There it is a 400 whatever they say."""
    asked = {"input": "Hi", "truncation": "auto"}
    assert (await client.post("/v1/responses", json=asked)).status_code == 200
    asked = {"messages": HI, "truncate": True, "stream": False}
    assert (await client.post("/api/chat", json=asked)).status_code == 200


async def test_a_dumped_answer_is_a_message(client: httpx.AsyncClient, gateway: Any) -> None:
    """What the SDK makes of an answer, its nulls included, comes back with the next question."""
    import openai.types.chat as sdk

    event = TokenEvent(choice=0, text="Yo", token_ids=[1], finish_reason="stop")
    gateway.script = lambda request: [[event]]
    answer = await client.post("/v1/chat/completions", json={"messages": HI})
    message = sdk.ChatCompletion.model_validate(answer.json()).choices[0].message
    again = {"messages": [*HI, message.model_dump(), *HI]}
    assert (await client.post("/v1/chat/completions", json=again)).status_code == 200


WEBUI = {
    "X-OpenWebUI-User-Name": "Ann",
    "X-OpenWebUI-User-Id": "1",
    "X-OpenWebUI-User-Email": "a@b",
    "X-OpenWebUI-User-Role": "user",
    "X-OpenWebUI-Chat-Id": "2",
    "Authorization": "Bearer x",
}
TURNS = [
    {"role": "system", "content": "Be brief."},
    *HI,
    {"role": "assistant", "content": "Yo"},
    {"role": "user", "content": [{"type": "text", "text": "And?"}]},
]
TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": {"type": "object"}},
}


async def test_open_webui_over_openai(client: httpx.AsyncClient, gateway: Any) -> None:
    listed = (await client.get("/v1/models", headers=WEBUI)).json()["data"]
    assert {"id", "object", "created", "owned_by"} <= listed[0].keys()
    bodies: list[dict[str, Any]] = [
        {"stream": True, "stream_options": {"include_usage": True}},
        {"stream": True, "temperature": 0.7, "top_p": 0.9, "max_tokens": 128, "stop": ["x"]},
        {"stream": True, "frequency_penalty": 0.1, "seed": 3, "logit_bias": {"5": 1}},
        {"stream": False, "max_completion_tokens": 1000},
        {"stream": True, "tools": [TOOL], "reasoning_effort": "low"},
        {"stream": True, "response_format": {"type": "json_object"}},
    ]
    for body in bodies:
        sent = {"model": listed[0]["id"], "messages": TURNS, **body}
        answer = await client.post("/v1/chat/completions", json=sent, headers=WEBUI)
        assert answer.status_code == 200, answer.text
        if body["stream"]:
            *_, last, done = [line for line in answer.text.splitlines() if line]
            assert done == "data: [DONE]" and json.loads(last[6:])["object"]
    answer = await client.post(
        "/v1/embeddings", json={"input": ["a", "b"], "model": "tiny"}, headers=WEBUI
    )
    assert len(answer.json()["data"]) == 2
    sent = {"model": "tiny", "query": "q", "documents": ["a", "bc"], "top_n": 2}
    ranked = (await client.post("/v1/rerank", json=sent, headers=WEBUI)).json()["results"]
    assert {"index", "relevance_score"} <= ranked[0].keys()


async def test_open_webui_over_ollama(client: httpx.AsyncClient, gateway: Any) -> None:
    """It looks for a version, models and what is loaded, and names models with their tags."""
    assert (await client.get("/api/version", headers=WEBUI)).json()["version"]
    models = (await client.get("/api/tags", headers=WEBUI)).json()["models"]
    assert {"name", "model", "modified_at", "size", "digest", "details"} <= models[0].keys()
    assert (await client.get("/api/ps", headers=WEBUI)).status_code == 200
    name = models[0]["name"]
    assert (await client.post("/api/show", json={"model": name})).status_code == 200
    call = {"function": {"name": "f", "arguments": {}}}
    said = [
        {"role": "assistant", "content": "", "tool_calls": [{**call, "id": "c"}]},
        {"role": "tool", "tool_call_id": "c", "content": "1"},
    ]
    options = {"temperature": 0.7, "num_ctx": 2048, "num_predict": 128, "stop": ["x"], "seed": 3}
    bodies: list[dict[str, Any]] = [
        {"stream": True, "options": options, "keep_alive": "5m"},
        {"stream": True, "tools": [TOOL], "messages": [*HI, *said]},
        {"stream": False, "format": {"type": "object"}, "think": True},
        {"stream": False, "messages": [{"role": "user", "content": "Hi", "images": []}]},
    ]
    for body in bodies:
        sent = {"model": name, "messages": HI, **body}
        answer = await client.post("/api/chat", json=sent, headers=WEBUI)
        assert answer.status_code == 200, answer.text
        assert json.loads(answer.text.splitlines()[-1])["done"] is True
    embedded = await client.post("/api/embed", json={"model": name, "input": ["a"]}, headers=WEBUI)
    assert len(embedded.json()["embeddings"]) == 1
