"""`/v1/admin/config` and `/v1/admin/reload`, over a gateway that only keeps its settings."""

from __future__ import annotations

from typing import Any

import httpx

from mlx_serving.api.app import create_app
from mlx_serving.config import Config


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
    gateway.live.read = lambda: Config(max_queue=3, port=9)
    assert (await client.post("/v1/admin/reload")).json() == {
        "applied": {"max_queue": 3},
        "needs_restart": ["port"],
    }


async def test_only_the_admin_key_may(gateway: Any) -> None:
    transport = httpx.ASGITransport(create_app(gateway, Config(api_key=("k",), admin_key="boss")))
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
