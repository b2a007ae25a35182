"""Canaries, A/B tests and shadows: start them, look at them, promote or end them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from mlx_serving.api.body import convert, read_object
from mlx_serving.api.exchange import Exchange
from mlx_serving.api.port import GatewayPort
from mlx_serving.traffic.rollouts import Report, Score, Spec

PREFIX = "/v1/rollouts/"


class ReportList(msgspec.Struct):
    data: list[Report]
    object: Literal["list"] = "list"


class Removed(msgspec.Struct):
    name: str
    deleted: Literal[True] = True


BODIES: Mapping[str, type[msgspec.Struct]] = {
    "POST /v1/rollouts": Spec,
    "POST /v1/rollouts/{name}/scores": Score,
}
ANSWERS: Mapping[str, type[msgspec.Struct]] = {
    "POST /v1/rollouts": Report,
    "GET /v1/rollouts": ReportList,
    "GET /v1/rollouts/{name}": Report,
    "POST /v1/rollouts/{name}/promote": Report,
    "POST /v1/rollouts/{name}/rollback": Report,
    "POST /v1/rollouts/{name}/scores": Report,
    "DELETE /v1/rollouts/{name}": Removed,
}


class RolloutRoutes:
    def __init__(self, gateway: GatewayPort) -> None:
        self._gateway = gateway
        self._live = gateway.live

    async def start(self, exchange: Exchange) -> None:
        spec = convert(await self._body(exchange), Spec)
        found = self._gateway.start_rollout(spec)
        await self._report(exchange, found.spec.name)

    async def all(self, exchange: Exchange) -> None:
        rollouts = self._gateway.rollouts
        data = [rollouts.report(name) for name in rollouts.names()]
        await exchange.respond(200, msgspec.json.encode(ReportList(data)))

    async def one(self, exchange: Exchange) -> None:
        await self._report(exchange, _name(exchange))

    async def promote(self, exchange: Exchange) -> None:
        name = _name(exchange).removesuffix("/promote")
        self._gateway.rollouts.promote(name)
        await self._report(exchange, name)

    async def roll_back(self, exchange: Exchange) -> None:
        name = _name(exchange).removesuffix("/rollback")
        self._gateway.rollouts.roll_back(name)
        await self._report(exchange, name)

    async def score(self, exchange: Exchange) -> None:
        name = _name(exchange).removesuffix("/scores")
        given = convert(await self._body(exchange), Score)
        self._gateway.rollouts.score(name, given)
        await self._report(exchange, name)

    async def remove(self, exchange: Exchange) -> None:
        name = _name(exchange)
        self._gateway.rollouts.remove(name)
        await exchange.respond(200, msgspec.json.encode(Removed(name)))

    async def _body(self, exchange: Exchange) -> dict[str, Any]:
        return read_object(await exchange.body(self._live.config.max_body_bytes))

    async def _report(self, exchange: Exchange, name: str) -> None:
        await exchange.respond(200, msgspec.json.encode(self._gateway.rollouts.report(name)))


def _name(exchange: Exchange) -> str:
    return exchange.path.removeprefix(PREFIX)
