"""The settings in force: look at them, change them, read them anew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from mlx_serving.api.body import read_object
from mlx_serving.api.exchange import Exchange
from mlx_serving.api.port import GatewayPort
from mlx_serving.live import LIVE, Change


class Settings(msgspec.Struct):
    settings: Mapping[str, Any]
    live: list[str]
    object: Literal["config"] = "config"


ANSWERS: Mapping[str, type[msgspec.Struct]] = {
    "GET /v1/admin/config": Settings,
    "PATCH /v1/admin/config": Change,
    "POST /v1/admin/reload": Change,
}


class SettingsRoutes:
    def __init__(self, gateway: GatewayPort) -> None:
        self._live = gateway.live

    async def show(self, exchange: Exchange) -> None:
        """Every setting, and which of them can change while the server runs."""
        settings = Settings(self._live.shown(), sorted(LIVE))
        await exchange.respond(200, msgspec.json.encode(settings))

    async def change(self, exchange: Exchange) -> None:
        values = read_object(await exchange.body(self._live.config.max_body_bytes))
        await exchange.respond(200, msgspec.json.encode(await self._live.change(values)))

    async def reload(self, exchange: Exchange) -> None:
        await exchange.respond(200, msgspec.json.encode(await self._live.reload()))
