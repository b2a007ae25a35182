"""Everything around the completions: the other routes, bodies, ids, and unknown paths."""

from __future__ import annotations

import asyncio
import gzip
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from mlx_serving.api.app import create_app
from mlx_serving.config import Config

CHAT = "/v1/chat/completions"


async def test_models_are_loaded_unloaded_and_pinned(
    client: httpx.AsyncClient, gateway: Any
) -> None:
    for action in ("load", "unload", "pin", "unpin"):
        answer = (await client.post(f"/v1/models/tiny/{action}")).json()
        assert (answer["id"], answer["pinned"]) == ("tiny", action == "pin")
    assert (gateway.loads, gateway.unloads) == ([("tiny", "anew")], ["tiny"])
    assert (await client.post("/v1/models/org/big:4bit/load")).status_code == 200
    assert (await client.post("/v1/models/none/load")).status_code == 404
    assert (await client.post("/v1/models/tiny/melt")).status_code == 405
    # A model of that name; not the action on a model of none.
    assert (await client.get("/v1/models/load")).status_code == 404


async def test_models(client: httpx.AsyncClient) -> None:
    body = (await client.get("/v1/models")).json()
    assert body["object"] == "list"
    assert body["data"][0] == {
        "id": "tiny",
        "object": "model",
        "created": 7,
        "owned_by": "mlx-serving",
        "status": "ready",
        "reason": None,
        "cause": None,
        "aliases": ["small"],
        "context_length": 8192,
        "pinned": False,
        "expires_in_s": None,
        "wired_bytes": 0,
        "not_wired": None,
        "parent": None,
    }
    assert body["data"][1]["reason"] == "no such file"


async def test_usable_models_alone(client: httpx.AsyncClient) -> None:
    async def ids(query: str, **headers: str) -> list[str]:
        response = await client.get(f"/v1/models?{query}", headers=headers)
        return [model["id"] for model in response.json()["data"]]

    assert await ids("usable=true") == ["tiny"]
    assert await ids("usable=false") == ["org/big:4bit"]
    assert await ids("limit=9") == ["tiny", "org/big:4bit"]
    assert await ids("usable=true", **{"anthropic-version": "2023-06-01"}) == ["tiny"]
    response = await client.get("/v1/models?usable=maybe")
    assert (response.status_code, response.json()["error"]["param"]) == (400, "usable")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("tiny", "tiny"),
        ("small", "tiny"),
        ("org/big:4bit", "org/big:4bit"),
        ("org%2Fbig:4bit", "org/big:4bit"),
    ],
)
async def test_one_model(client: httpx.AsyncClient, name: str, found: str) -> None:
    assert (await client.get(f"/v1/models/{name}")).json()["id"] == found


async def test_the_prefix_caches_are_shown_and_emptied(client: httpx.AsyncClient) -> None:
    (shown,) = (await client.get("/v1/cache/stats")).json()["models"]
    assert shown["model"] == "tiny"
    assert (shown["prefix"]["memory_blocks"], shown["prefix"]["disk_lost"]) == (3, 1)
    response = await client.delete("/v1/cache")
    assert response.status_code == 200
    assert response.json()["models"][0]["prefix"]["memory_blocks"] == 0
    assert (await client.get("/v1/cache")).status_code == 405


async def test_a_model_that_is_not_served(client: httpx.AsyncClient) -> None:
    response = await client.get("/v1/models/gpt-9")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert response.json()["error"]["param"] == "model"


@pytest.mark.parametrize(
    ("status", "ready"), [("ready", 200), ("starting", 503), ("degraded", 503), ("draining", 503)]
)
async def test_health_always_answers_and_ready_tells(
    client: httpx.AsyncClient, gateway: Any, status: str, ready: int
) -> None:
    gateway.status = status
    health = await client.get("/health")
    assert (health.status_code, health.json()["status"]) == (200, status)
    assert health.json()["workers"][0]["pid"] == 42
    assert (await client.get("/ready")).status_code == ready


async def test_metrics_and_index(client: httpx.AsyncClient) -> None:
    metrics = await client.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert metrics.text.startswith("# HELP")
    index = (await client.get("/")).json()
    assert index["name"] == "mlx-serving"
    for endpoint in index["endpoints"]:
        method, path = endpoint.split()
        if "{" in path:  # test_openapi asks them
            continue
        assert (await client.request(method, path)).status_code != 404
    assert (await client.head("/health")).status_code == 200


@pytest.mark.parametrize("path", ["/v1/nothing", "/V1/models", "/v1"])
async def test_unknown_paths(client: httpx.AsyncClient, path: str) -> None:
    response = await client.get(f"http://test{path}")
    assert response.status_code == 404
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("method", "path", "allow"), [("GET", CHAT, "POST"), ("DELETE", "/health", "GET")]
)
async def test_wrong_methods(client: httpx.AsyncClient, method: str, path: str, allow: str) -> None:
    response = await client.request(method, path)
    assert (response.status_code, response.headers["allow"]) == (405, allow)
    assert response.json()["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"{", None),
        (b"[]", None),
        (b"3", None),
        (b"\xff\xfe", None),
        (b'{"messages": NaN}', None),
        (b'{"temperature": 1e999}', "temperature"),
        (b'{"seed": ' + b"9" * 6000 + b"}", "seed"),
        (b'{"user": "\\ud800x"}', None),
        (b"[" * 50_000, None),
        (b'{"messages": ' + b"[" * 50_000, None),
        (b'{"metadata": ' + b"[" * 20_000 + b"]" * 20_000 + b"}", None),
    ],
)
async def test_bodies_that_are_no_json_object(
    client: httpx.AsyncClient, body: bytes, param: str | None
) -> None:
    for route in (CHAT, "/v1/completions"):
        response = await client.post(route, content=body)
        assert response.status_code == 400
        error = response.json()["error"]
        assert (error["code"], error["param"]) == ("invalid_json", param)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_the_content_type_does_not_matter(client: httpx.AsyncClient, kind: str) -> None:
    body = b'{"messages": [{"role": "user", "content": "Hi"}]}'
    response = await client.post(CHAT, content=body, headers={"content-type": kind})
    assert response.status_code == 200


async def test_oversize_bodies_are_refused_unread(gateway: Any) -> None:
    gateway.live.config = Config(max_body_bytes=1024)
    app = create_app(gateway)
    reads = 0

    async def receive() -> dict[str, Any]:
        nonlocal reads
        reads += 1
        return {"type": "http.request", "body": b"x" * 100, "more_body": True}

    async def status(headers: list[tuple[bytes, bytes]]) -> int:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": headers}
        await app(scope, receive, send)
        return int(sent[0]["status"])

    assert await status([(b"content-length", b"1025")]) == 413
    assert reads == 0
    assert await status([(b"content-length", b"9" * 5000)]) == 413
    assert reads == 0
    # Chunked: no length is declared, and the body never ends.
    assert await status([]) == 413
    assert reads == 11


async def test_a_client_that_leaves_amid_its_body_gets_nothing(gateway: Any) -> None:
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": []}
    await create_app(gateway)(scope, receive, send)
    assert sent == []


async def test_request_ids(client: httpx.AsyncClient) -> None:
    given = await client.get("/health", headers={"x-request-id": "abc-1.2:x_Y"})
    assert given.headers["x-request-id"] == "abc-1.2:x_Y"
    for bad in ("a b", "x" * 129, "a;b", ""):
        made = await client.get("/nothing", headers={"x-request-id": bad})
        assert made.headers["x-request-id"].startswith("req-")
    ids = {(await client.get("/health")).headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3


async def test_requests_are_logged_at_debug_only(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "mlx_serving.api"):
        await client.get("/health")
    assert caplog.text == ""
    with caplog.at_level(logging.DEBUG, "mlx_serving.api"):
        await client.get("/health")
    assert "GET '/health' -> 200" in caplog.text


async def test_what_clients_do_wrong_is_logged_without_what_they_sent(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    message = {"role": "user", "content": "zebra"}
    with caplog.at_level(logging.INFO, "mlx_serving.api"):
        await client.post(CHAT, json={"messages": [message], "temperature": 9})
        await client.post(CHAT, json={"messages": [message | {"role": "zebra"}]})
        await client.get("/nothing")
    said = [record.getMessage().partition("] ")[2] for record in caplog.records]
    assert said == [
        "POST '/v1/chat/completions' -> 400 invalid_value (temperature)",
        "POST '/v1/chat/completions' -> 400 invalid_value (messages)",
        "GET '/nothing' -> 404 not_found",
    ]


async def test_a_compressed_body_is_refused_by_its_encoding(client: httpx.AsyncClient) -> None:
    body = gzip.compress(b'{"messages": [{"role": "user", "content": "x"}]}')
    refused = await client.post(CHAT, content=body, headers={"content-encoding": "gzip"})
    assert refused.status_code == 415 and "gzip" in refused.json()["error"]["message"]
    plain = {"messages": [{"role": "user", "content": "x"}]}
    taken = await client.post(CHAT, json=plain, headers={"content-encoding": "identity"})
    assert taken.status_code == 200


async def test_who_would_pull_over_http_is_told_how_it_is_done(client: httpx.AsyncClient) -> None:
    for method, path in (("POST", "/api/pull"), ("DELETE", "/api/delete")):
        answer = await client.request(method, path, json={"model": "x"})
        assert answer.status_code == 404 and "mlx-serving pull" in answer.json()["error"]


async def messages(*kinds: str) -> AsyncIterator[dict[str, str]]:
    for kind in kinds:
        yield {"type": kind}


async def test_other_scopes(gateway: Any) -> None:
    app = create_app(gateway)
    sent: list[str] = []
    events = messages("lifespan.startup", "lifespan.shutdown")

    async def receive() -> Any:
        return await anext(events)

    async def send(message: Any) -> None:
        sent.append(message["type"])

    await app({"type": "lifespan"}, receive, send)
    await asyncio.wait_for(app({"type": "websocket"}, receive, send), 5)
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete", "websocket.close"]
