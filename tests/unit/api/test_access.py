"""Who gets in, who does not, and in whose words they are told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from mlx_serving.api.access import Caller, Route, admin, exposures, is_loopback, public, refusal
from mlx_serving.api.app import create_app
from mlx_serving.api.keys import Key, Keyring
from mlx_serving.config import Config
from mlx_serving.secret import hashed
from mlx_serving.types import Priority

CI = Key(name="ci", hash=hashed("of-ci"))
KEYED = Keyring([CI])
ADMINISTERED = Keyring([CI], hashed("root"))
NOBODY, WRONG, HOLDER = Caller(), Caller(presented=True), Caller(key=CI, presented=True)
ADMIN = Caller(admin=True, presented=True)
HERE = Caller(local=True)


@pytest.mark.parametrize(
    ("access", "who", "keyring", "code"),
    [
        ("open", NOBODY, ADMINISTERED, None),
        ("open", WRONG, ADMINISTERED, None),
        ("key", NOBODY, Keyring(), None),
        ("key", WRONG, Keyring(), None),
        ("key", NOBODY, Keyring([], hashed("root")), None),
        ("key", NOBODY, KEYED, "missing_api_key"),
        ("key", HERE, KEYED, "missing_api_key"),
        ("key", WRONG, KEYED, "invalid_api_key"),
        ("key", HOLDER, KEYED, None),
        ("key", ADMIN, ADMINISTERED, None),
        ("admin", HERE, Keyring(), None),
        ("admin", NOBODY, Keyring(), "admin_key_required"),
        ("admin", HERE, KEYED, "missing_api_key"),
        ("admin", HOLDER, KEYED, "admin_key_required"),
        ("admin", Caller(key=CI, local=True, presented=True), KEYED, None),
        ("admin", HERE, ADMINISTERED, "missing_api_key"),
        ("admin", WRONG, ADMINISTERED, "invalid_api_key"),
        ("admin", HOLDER, ADMINISTERED, "admin_key_required"),
        ("admin", ADMIN, ADMINISTERED, None),
    ],
)
def test_the_decision(access: Any, who: Caller, keyring: Keyring, code: str | None) -> None:
    error = refusal(access, who, keyring)
    assert (error and error.code) == code


def test_marks() -> None:
    async def handler(exchange: Any) -> None: ...

    assert Route(handler).access == "key"
    assert public(handler).access == "open"
    assert admin(handler).access == "admin"


@pytest.mark.parametrize(
    ("host", "own"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.2", False),
        ("localhost.example.org", False),
    ],
)
def test_what_is_loopback(host: str, own: bool) -> None:
    assert is_loopback(host) is own


def test_a_wide_server_without_keys_is_warned_of() -> None:
    assert exposures(Config()) == []
    assert exposures(Config(host="0.0.0.0", uds="/run/x")) == []
    assert exposures(Config(host="0.0.0.0", api_key=("x",))) == []
    assert [code for code, _ in exposures(Config(host="0.0.0.0"))] == ["no_api_key"]


# ------------------------------------------------------------------- over the application

KEYS = f"""
keys:
  - name: ci
    hash: {hashed("of-ci")}
    models: [tiny]
    max_concurrent: 1
    priority: low
  - name: bob
    hash: {hashed("of-bob")}
    requests_per_min: 2
    share_cache: true
  - name: ann
    hash: {hashed("of-ann")}
    tokens_per_min: 6
"""
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
Connect = Callable[..., httpx.AsyncClient]


@pytest.fixture
def connect(gateway: Any, tmp_path: Path) -> Connect:
    """Clients of one server with KEYS, each with a key or none and an address."""
    file = tmp_path / "keys.yaml"
    file.write_text(KEYS)
    gateway.live.config = Config(api_keys_file=str(file), admin_key="root")
    app = create_app(gateway)

    def client(key: str | None = None, peer: str = "10.0.0.9", **headers: str) -> httpx.AsyncClient:
        auth = {"authorization": f"Bearer {key}"} if key else {}
        transport = httpx.ASGITransport(app, client=(peer, 1))
        return httpx.AsyncClient(transport=transport, base_url="http://x", headers=auth | headers)

    return client


async def test_no_key_or_a_wrong_one_in_each_dialect(connect: Connect, gateway: Any) -> None:
    for client, code in ((connect(), "missing_api_key"), (connect("no"), "invalid_api_key")):
        openai = await client.post("/v1/chat/completions", json=CHAT)
        assert openai.status_code == 401 and openai.headers["www-authenticate"] == "Bearer"
        assert openai.json()["error"]["code"] == code
        assert openai.json()["error"]["type"] == "authentication_error"
        anthropic = await client.post("/v1/messages", json=CHAT | {"max_tokens": 3})
        assert anthropic.status_code == 401
        assert anthropic.json()["error"]["type"] == "authentication_error"
        ollama = await client.post("/api/chat", json=CHAT | {"model": "tiny"})
        assert ollama.status_code == 401 and "API key" in ollama.json()["error"]
        for path in ("/v1/models", "/api/tags", "/metrics", "/v1/responses/x"):
            assert (await client.get(path)).status_code == 401
    assert gateway.requests == []


async def test_both_headers_open(connect: Connect) -> None:
    body = CHAT | {"max_tokens": 3, "model": "tiny"}
    for headers in ({"x-api-key": "of-ci"}, {"x-api-key": "none", "authorization": "bearer of-ci"}):
        answer = await connect(**headers).post("/v1/messages", json=body)
        assert answer.status_code == 200, answer.text


async def test_what_is_open_says_little(connect: Connect) -> None:
    stranger, holder = connect(), connect("of-ci")
    for path in ("/", "/docs", "/openapi.json"):
        assert (await stranger.get(path)).status_code == 200
    assert (await stranger.get("/health")).json() == {"status": "ready"}
    assert (await stranger.get("/ready")).json() == {"status": "ready"}
    assert (await holder.get("/health")).json() == {"status": "ready", "models": []}
    for whole in (connect("root"), connect(peer="127.0.0.1")):
        assert (await whole.get("/health")).json()["workers"]
    proxied = connect(peer="127.0.0.1", **{"x-forwarded-for": "10.0.0.9"})
    assert (await proxied.get("/health")).json() == {"status": "ready"}


async def test_how_long_a_model_stays_is_the_admin_s_to_say(connect: Connect, gateway: Any) -> None:
    asked = {"model": "tiny", "prompt": "x", "stream": False, "keep_alive": 0}
    client = connect("of-ann")
    answer = await client.post(
        "/api/embed", json={"model": "tiny", "input": "", "keep_alive": "5m"}
    )
    assert answer.headers["x-mlx-serving-advisory"] == "keep_alive"
    assert gateway.loads[-1] == ("tiny", None)
    refused = await client.post("/api/generate", json={"model": "tiny", "keep_alive": 0})
    assert (refused.status_code, gateway.unloads) == (403, [])
    answer = await client.post("/api/generate", json=asked)
    assert (answer.status_code, gateway.requests[-1].keep_alive_s) == (200, None)
    assert answer.headers["x-mlx-serving-advisory"] == "keep_alive"

    root = connect("root")
    await root.post("/api/generate", json=asked)
    assert gateway.requests[-1].keep_alive_s == 0
    await root.post("/api/generate", json={"model": "tiny", "keep_alive": 0})
    assert gateway.unloads == ["tiny"]


async def test_a_key_s_models(connect: Connect, gateway: Any) -> None:
    client = connect("of-ci")
    listed = (await client.get("/v1/models")).json()["data"]
    assert [model["id"] for model in listed] == ["tiny"]
    assert len((await connect("of-bob").get("/v1/models")).json()["data"]) == 2
    for name in ("tiny", "small"):
        assert (
            await client.post("/v1/completions", json={"prompt": "x", "model": name})
        ).is_success
    for name in ("org/big:4bit", "no-such-model"):
        refused = await client.post("/v1/completions", json={"prompt": "x", "model": name})
        assert refused.status_code == 403
        assert refused.json()["error"]["code"] == "model_not_allowed"
        assert refused.json()["error"]["param"] == "model"
        tokens = await client.post("/tokenize", json={"prompt": "x", "model": name})
        assert tokens.status_code == 403
    assert {request.model for request in gateway.requests} == {"tiny", "small"}


async def test_the_request_travels_under_the_key_s_name(connect: Connect, gateway: Any) -> None:
    async def sent(key: str, **fields: Any) -> tuple[str | None, str | None, Priority]:
        answer = await connect(key).post("/v1/chat/completions", json=CHAT | fields)
        assert answer.status_code == 200, answer.text
        request = gateway.requests[-1]
        return request.client, request.cache_salt, request.priority

    assert await sent("of-ci") == ("ci", "ci/", Priority.LOW)
    assert await sent("of-ci", cache_salt="s", priority="critical") == ("ci", "ci/s", Priority.LOW)
    assert await sent("of-bob") == ("bob", None, Priority.NORMAL)
    assert await sent("of-bob", cache_salt="ci/s") == ("bob", "/ci/s", Priority.NORMAL)
    assert await sent("root") == (None, None, Priority.NORMAL)


async def test_requests_a_minute(connect: Connect) -> None:
    client = connect("of-bob")
    codes = [(await client.post("/v1/completions", json={"prompt": "x"})) for _ in range(3)]
    assert [answer.status_code for answer in codes] == [200, 200, 429]
    assert 1 <= int(codes[2].headers["retry-after"]) <= 30
    assert codes[2].json()["error"]["code"] == "rate_limit_exceeded"
    anthropic = await client.post("/v1/messages", json=CHAT | {"model": "tiny", "max_tokens": 2})
    assert (anthropic.status_code, anthropic.json()["error"]["type"]) == (429, "rate_limit_error")


async def test_tokens_a_minute(connect: Connect) -> None:
    client = connect("of-ann")
    # Five of the prompt and two of the answer.
    assert (await client.post("/v1/completions", json={"prompt": "x"})).status_code == 200
    assert (await client.post("/v1/completions", json={"prompt": "x"})).status_code == 429


async def test_requests_at_once(connect: Connect, gateway: Any) -> None:
    script, gateway.script = gateway.script, lambda request: ["hang"]
    client = connect("of-ci")
    first = asyncio.create_task(client.post("/v1/completions", json={"prompt": "x"}))
    while not gateway.generations:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    busy = await client.post("/v1/completions", json={"prompt": "x"})
    assert (busy.status_code, busy.headers["retry-after"]) == (429, "1")
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    gateway.script = script
    assert (await client.post("/v1/completions", json={"prompt": "x"})).status_code == 200


async def test_a_refused_request_leaves_again(connect: Connect, gateway: Any) -> None:
    client = connect("of-ci")
    for _ in range(3):
        wrong = await client.post("/v1/completions", json={"prompt": "x", "temperature": 9})
        assert wrong.status_code == 400
        gateway.refuse = lambda request: ValueError("ours")
        assert (await client.post("/v1/completions", json={"prompt": "x"})).status_code == 500
        gateway.refuse = lambda request: None
    assert (await client.post("/v1/completions", json={"prompt": "x"})).status_code == 200


async def test_one_key_s_things_are_not_another_s(connect: Connect, gateway: Any) -> None:
    mine, theirs = connect("of-ci"), connect("of-bob")
    made = (await mine.post("/v1/responses", json={"input": "Hi", "store": True})).json()
    path = f"/v1/responses/{made['id']}"
    assert (await theirs.get(path)).status_code == 404
    assert (await theirs.delete(path)).status_code == 404
    follow = {"input": "more", "previous_response_id": made["id"]}
    assert not (await theirs.post("/v1/responses", json=follow)).is_success
    assert (await mine.post("/v1/responses", json=follow)).status_code == 200
    assert (await mine.delete(path)).status_code == 200


async def test_one_key_cannot_cancel_another_s_request(connect: Connect, gateway: Any) -> None:
    gateway.script = lambda request: ["hang"]
    client = connect("of-bob", **{"x-request-id": "guessable"})
    running = asyncio.create_task(client.post("/v1/completions", json={"prompt": "x"}))
    while not gateway.generations:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    path = "/v1/requests/guessable/cancel"
    assert (await connect("of-ci").post(path)).status_code == 404
    assert not gateway.generations[0].cancelled
    assert (await connect("root").post(path)).status_code == 200
    assert gateway.generations[0].cancelled
    await running


@pytest.mark.parametrize(
    ("setting", "key", "status"),
    [("open", None, 200), ("key", None, 401), ("key", "one", 200), ("admin", "one", 403)],
)
async def test_who_reads_metrics(gateway: Any, setting: Any, key: str | None, status: int) -> None:
    gateway.live.config = Config(api_key=("one",), metrics_access=setting)
    transport = httpx.ASGITransport(create_app(gateway), client=("10.0.0.9", 1))
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        assert (await client.get("/metrics", headers=headers)).status_code == status
