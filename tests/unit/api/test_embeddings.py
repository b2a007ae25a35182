"""/v1/embeddings, /v1/rerank and Ollama's /api/embed: what is asked of the gateway, and how it is told."""

from __future__ import annotations

import asyncio
import base64
import struct
from typing import Any

import httpx
import jsonschema
import msgspec
import pytest

from mlx_serving.api.app import ENDPOINTS
from mlx_serving.api.openapi import ANSWERS, document
from mlx_serving.types import EmbedRequest, Priority, RankRequest, TextPrompt, TokenPrompt

DOCUMENT = msgspec.json.decode(document(ENDPOINTS))
RERANKS = ("/v1/rerank", "/v2/rerank", "/rerank")


async def post(client: httpx.AsyncClient, path: str, **body: Any) -> dict[str, Any]:
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    if path in ANSWERS:
        told = DOCUMENT["paths"][path]["post"]["responses"]["200"]["content"]["application/json"]
        schema = told["schema"] | {"components": DOCUMENT["components"]}
        jsonschema.Draft202012Validator(schema).validate(response.json())
    return response.json()


async def refused(client: httpx.AsyncClient, path: str, **body: Any) -> tuple[int, str, str | None]:
    response = await client.post(path, json=body)
    error = response.json()
    error = error if isinstance(error["error"], str) else error["error"]
    return response.status_code, error["code"], error["param"]


@pytest.mark.parametrize(
    ("given", "inputs", "single"),
    [
        ("one", (TextPrompt(text="one"),), True),
        ("", (TextPrompt(text=""),), True),
        (["a", "b"], (TextPrompt(text="a"), TextPrompt(text="b")), False),
        ([5, 6, 7], (TokenPrompt(token_ids=(5, 6, 7)),), True),
        ([[5], [6, 7]], (TokenPrompt(token_ids=(5,)), TokenPrompt(token_ids=(6, 7))), False),
    ],
)
async def test_the_four_forms_of_input(
    client: httpx.AsyncClient, gateway: Any, given: Any, inputs: Any, single: bool
) -> None:
    answer = await post(client, "/v1/embeddings", input=given)
    (request,) = gateway.pooled
    assert (request.inputs, request.single, request.model) == (inputs, single, "tiny")
    assert [item["index"] for item in answer["data"]] == list(range(len(inputs)))
    assert answer["data"][0]["object"] == "embedding" and answer["object"] == "list"
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"]


async def test_base64_is_little_endian_float32(client: httpx.AsyncClient) -> None:
    floats = await post(client, "/v1/embeddings", input=["four", "x"], encoding_format="float")
    packed = await post(client, "/v1/embeddings", input=["four", "x"], encoding_format="base64")
    for plain, coded in zip(floats["data"], packed["data"], strict=True):
        assert struct.unpack("<2f", base64.b64decode(coded["embedding"])) == tuple(
            plain["embedding"]
        )
    assert floats["data"][0]["embedding"] == [4.0, 0.0]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"dimensions": 3}, {"dimensions": 3}),
        ({"normalize": False}, {"normalize": False}),
        ({"truncate_prompt_tokens": 7}, {"truncate": 7}),
        ({"truncate_prompt_tokens": -1}, {"truncate": 2**31 - 1}),
        ({"prompt_name": "query"}, {"prompt_name": "query"}),
        ({"priority": "low"}, {"priority": Priority.LOW}),
        ({"priority": -20}, {"priority": Priority.CRITICAL}),
        ({"model": "small"}, {"model": "small"}),
        ({}, {"dimensions": None, "normalize": True, "truncate": None, "prompt_name": None}),
    ],
)
async def test_each_honoured_field_reaches_the_gateway(
    client: httpx.AsyncClient, gateway: Any, fields: dict[str, Any], expected: dict[str, Any]
) -> None:
    await post(client, "/v1/embeddings", input="x", **fields)
    request = gateway.pooled[0]
    assert isinstance(request, EmbedRequest)
    assert {name: getattr(request, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({}, "invalid_value", "input"),
        ({"input": []}, "invalid_value", "input"),
        ({"input": ["a", 5]}, "invalid_value", "input[1]"),
        ({"input": ["a", ["b"]]}, "invalid_value", "input[1]"),
        ({"input": [[1], []]}, "invalid_value", "input[1]"),
        ({"input": [[1], [True]]}, "invalid_value", "input[1][0]"),
        ({"input": [1, -1]}, "invalid_value", "input[1]"),
        ({"input": [None]}, "invalid_value", "input[0]"),
        ({"input": ["x"] * 2049}, "invalid_value", "input"),
        ({"input": "x", "encoding_format": "hex"}, "invalid_value", "encoding_format"),
        ({"input": "x", "dimensions": 0}, "invalid_value", "dimensions"),
        ({"input": "x", "truncate_prompt_tokens": 0}, "invalid_value", "truncate_prompt_tokens"),
        ({"input": "x", "priority": "soon"}, "invalid_value", "priority"),
        ({"input": "x", "messages": []}, "unsupported_parameter", "messages"),
        (
            {"input": "x", "add_special_tokens": False},
            "unsupported_parameter",
            "add_special_tokens",
        ),
        ({"input": "x", "mood": 1}, "unknown_parameter", "mood"),
    ],
)
async def test_each_refusal_names_its_field(
    client: httpx.AsyncClient, gateway: Any, body: Any, code: str, param: str
) -> None:
    assert await refused(client, "/v1/embeddings", **body) == (400, code, param)
    assert not gateway.pooled


async def test_advisory_fields_are_named(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/embeddings", json={"input": "x", "user": "u"})
    assert response.headers["x-mlx-serving-advisory"] == "user"


@pytest.mark.parametrize("path", RERANKS)
async def test_rerank(client: httpx.AsyncClient, gateway: Any, path: str) -> None:
    documents = ["a", {"text": "the longest"}, "middle"]
    answer = await post(client, path, query="q", documents=documents, top_n=2)
    assert [(r["index"], r["relevance_score"]) for r in answer["results"]] == [(1, 1.1), (2, 0.6)]
    assert [r["document"]["text"] for r in answer["results"]] == ["the longest", "middle"]
    assert answer["usage"] == {"prompt_tokens": 9, "total_tokens": 9}
    assert answer["id"] == gateway.pooled[0].request_id and answer["model"] == "tiny"
    bare = await post(client, path, query="q", documents=documents, return_documents=False)
    assert all(set(result) == {"index", "relevance_score"} for result in bare["results"])
    assert len(bare["results"]) == 3


async def test_what_rerank_asks(client: httpx.AsyncClient, gateway: Any) -> None:
    fields = {"max_tokens_per_doc": 5, "truncate_prompt_tokens": 20, "priority": "high"}
    await post(client, "/rerank", query="q", documents=["d"], model="small", **fields)
    request = gateway.pooled[0]
    assert isinstance(request, RankRequest)
    assert (request.max_document_tokens, request.truncate) == (5, 20)
    assert (request.priority, request.model) == (Priority.HIGH, "small")


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"documents": ["d"]}, "invalid_value", "query"),
        ({"query": "", "documents": ["d"]}, "invalid_value", "query"),
        ({"query": "q"}, "invalid_value", "documents"),
        ({"query": "q", "documents": []}, "invalid_value", "documents"),
        ({"query": "q", "documents": [3]}, "invalid_value", "documents[0]"),
        ({"query": "q", "documents": [{"text": "d", "x": 1}]}, "unknown_parameter", "documents[0].x"),
        ({"query": "q", "documents": ["d"], "top_n": 0}, "invalid_value", "top_n"),
        ({"query": "q", "documents": ["d"], "rank_fields": ["a"]}, "unsupported_parameter", "rank_fields"),
    ],
)  # fmt: skip
async def test_rerank_refusals(client: httpx.AsyncClient, body: Any, code: str, param: str) -> None:
    assert await refused(client, "/v1/rerank", **body) == (400, code, param)


async def test_ollama_embed(client: httpx.AsyncClient, gateway: Any) -> None:
    answer = await post(client, "/api/embed", model="tiny:latest", input=["four", "x"])
    assert answer["model"] == "tiny:latest" and answer["embeddings"] == [[4.0, 0.0], [1.0, 1.0]]
    assert answer["prompt_eval_count"] == 5
    assert 0 <= answer["load_duration"] <= answer["total_duration"]
    await post(client, "/api/embed", model="tiny", input="x", truncate=False, dimensions=1)
    first, second = gateway.pooled
    assert (first.model, first.truncate, first.single) == ("tiny", 2**31 - 1, False)
    assert (second.truncate, second.dimensions, second.single) == (None, 1, True)


@pytest.mark.parametrize("given", [{}, {"input": []}, {"input": ""}])
async def test_ollama_embed_of_nothing_loads(
    client: httpx.AsyncClient, gateway: Any, given: Any
) -> None:
    assert (await post(client, "/api/embed", model="tiny", **given))["embeddings"] == []
    assert not gateway.pooled


async def test_ollama_embeddings(client: httpx.AsyncClient, gateway: Any) -> None:
    assert await post(client, "/api/embeddings", model="tiny", prompt="four") == {
        "embedding": [4.0, 0.0]
    }
    request = gateway.pooled[0]
    assert (request.normalize, request.truncate, request.param) == (False, 2**31 - 1, "prompt")
    assert await post(client, "/api/embeddings", model="tiny") == {"embedding": []}


@pytest.mark.parametrize("path", ["/api/embed", "/api/embeddings"])
async def test_ollama_refusals(client: httpx.AsyncClient, path: str) -> None:
    assert await refused(client, path, options={"mood": 1}) == (400, "unknown_parameter", "options.mood")  # fmt: skip
    assert (await refused(client, path, keep_alive="soon"))[2] == "keep_alive"
    assert (await refused(client, path, model="gone"))[0] == 404
    response = await client.post(path, json={"options": {"num_ctx": 5, "temperature": 0.1}})
    named = response.headers["x-mlx-serving-advisory"]
    assert named == "options, options.num_ctx, options.temperature"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"input": "x"}),
        ("/v1/rerank", {"query": "q", "documents": ["d"]}),
        ("/api/embed", {"input": "x"}),
    ],
)
async def test_it_can_be_cancelled_by_its_id(
    client: httpx.AsyncClient, gateway: Any, path: str, body: Any
) -> None:
    gateway.open_hangs = True
    asked = asyncio.create_task(client.post(path, json=body, headers={"x-request-id": "mine"}))
    while not gateway.pooled:  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    assert (await client.post("/v1/requests/mine/cancel")).status_code == 200
    assert (await asked).status_code == 499
    assert gateway.open_was_cancelled
