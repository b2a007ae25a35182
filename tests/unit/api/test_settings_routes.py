"""`/v1/admin/config` and `/v1/admin/reload`, over a gateway that only keeps its settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
from msgspec.structs import replace

from mlx_serving.api.app import create_app
from mlx_serving.config import Config
from mlx_serving.secret import hashed


async def test_the_settings_in_force_and_which_can_change(client: httpx.AsyncClient) -> None:
    shown = (await client.get("/v1/admin/config")).json()
    assert shown["object"] == "config" and shown["settings"]["max_queue"] == 1024
    assert "max_queue" in shown["live"] and "port" not in shown["live"]


async def test_a_change(client: httpx.AsyncClient) -> None:
    response = await client.patch("/v1/admin/config", json={"max_queue": 3, "slo": ["errors < 1%"]})
    assert response.status_code == 200
    assert response.json() == {
        "applied": {"slo": ["errors < 1%"], "max_queue": 3},
        "needs_restart": [],
    }
    assert (await client.get("/v1/admin/config")).json()["settings"]["max_queue"] == 3


async def test_a_change_that_cannot_be(client: httpx.AsyncClient) -> None:
    for body, param, code in (
        ({"max_queue": 3, "max_tokens": 0}, "max_tokens", "invalid_config"),
        ({"max_queue": 3, "port": 9}, "port", "needs_restart"),
        ({"max_queue": 3, "max_quue": 9}, "max_quue", "invalid_value"),
    ):
        response = await client.patch("/v1/admin/config", json=body)
        error = response.json()["error"]
        assert (response.status_code, error["param"], error["code"]) == (400, param, code)
    assert (await client.patch("/v1/admin/config", content=b"[1]")).status_code == 400
    assert (await client.get("/v1/admin/config")).json()["settings"]["max_queue"] == 1024


async def test_a_reload(client: httpx.AsyncClient, gateway: Any) -> None:
    assert (await client.post("/v1/admin/reload")).status_code == 400
    gateway.live.read = lambda: replace(gateway.live.config, max_queue=3, port=9)
    assert (await client.post("/v1/admin/reload")).json() == {
        "applied": {"max_queue": 3},
        "needs_restart": ["port"],
    }


async def test_only_the_admin_key_may(gateway: Any) -> None:
    gateway.live.config = Config(api_key=("k",), admin_key="boss")
    transport = httpx.ASGITransport(create_app(gateway))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for method, path in (
            ("GET", "/v1/admin/config"),
            ("PATCH", "/v1/admin/config"),
            ("POST", "/v1/admin/reload"),
        ):
            for key, allowed in (("", False), ("k", False), ("boss", True)):
                headers = {"authorization": f"Bearer {key}"} if key else {}
                answer = await client.request(method, path, headers=headers, json={})
                assert (answer.status_code not in (401, 403)) == allowed


KEYS = "keys:\n  - {name: ann, hash: %s, requests_per_min: %d}\n"


async def test_keys_that_change_in_their_file(gateway: Any, tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(KEYS % (hashed("old"), 1))
    config = Config(api_keys_file=str(file), admin_key="boss")
    gateway.live.config = config
    gateway.live.read = lambda: config
    transport = httpx.ASGITransport(create_app(gateway), client=("10.0.0.9", 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:

        async def status(key: str) -> int:
            headers = {"authorization": f"Bearer {key}"}
            answer = await client.post("/v1/completions", json={"prompt": "x"}, headers=headers)
            return answer.status_code

        async def reload() -> httpx.Response:
            return await client.post("/v1/admin/reload", headers={"authorization": "Bearer boss"})

        assert [await status(key) for key in ("old", "old", "new")] == [200, 429, 401]
        assert (await reload()).json()["applied"] == {}
        file.write_text("keys: []")
        assert (await reload()).status_code == 400
        assert [await status(key) for key in ("old", "new")] == [429, 401]
        file.write_text(KEYS % (hashed("new"), 2))
        assert (await reload()).json()["applied"] == {"api_keys_file": str(file)}
        assert [await status(key) for key in ("old", "new", "new", "new")] == [401, 200, 200, 429]


async def test_what_the_api_takes_changes(gateway: Any) -> None:
    gateway.live.config = Config(max_tokens=4)
    app = create_app(gateway)
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://test"
    ) as client:

        async def patch(**values: Any) -> None:
            answer = await client.patch("/v1/admin/config", json=values)
            assert answer.status_code == 200 and answer.json()["applied"].keys() == values.keys()

        async def send(**more: Any) -> int:
            body = {"prompt": "x" * 2000, **more}
            return (await client.post("/v1/completions", json=body)).status_code

        assert (await send(), gateway.requests[-1].max_tokens) == (200, 4)
        assert await send(nonsense=1) == 400
        await patch(max_tokens=6, unknown_fields="warn")
        assert (await send(nonsense=1), gateway.requests[-1].max_tokens) == (200, 6)
        await patch(max_body_bytes=1024)
        assert await send() == 413
        await patch(max_body_bytes=4096, admin_key="boss", api_key=["k"])
        assert await send() == 401
        shown = await client.get("/v1/admin/config", headers={"authorization": "Bearer boss"})
        assert shown.json()["settings"]["api_key"] == "(not shown)"


def test_what_connections_and_pages_may_changes(start_server: Any, gateway: Any) -> None:
    server = start_server()
    origin = {"origin": "https://chat.example.org"}
    with httpx.Client(base_url=server.address) as client:
        assert client.get("/v1/models", headers=origin).status_code == 403
        changes = {"cors_origin": [origin["origin"]], "max_header_bytes": 1024}
        assert client.patch("/v1/admin/config", json=changes).status_code == 200
        assert client.get("/v1/models", headers=origin).status_code == 200
    large = {"x-padding": "x" * 2000}
    with httpx.Client(base_url=server.address) as later:
        assert later.get("/v1/models", headers=large).status_code == 431
