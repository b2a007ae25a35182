"""`/v1/cache`: what the prefix caches hold and did, and how to empty them."""

from __future__ import annotations

import msgspec

from mlx_serving.api.exchange import Exchange
from mlx_serving.api.port import GatewayPort


class CacheRoutes:
    def __init__(self, gateway: GatewayPort) -> None:
        self._gateway = gateway

    async def stats(self, exchange: Exchange) -> None:
        await self._answer(exchange)

    async def clear(self, exchange: Exchange) -> None:
        """What running sequences use stays."""
        await self._gateway.clear_cache()
        await self._answer(exchange)

    async def _answer(self, exchange: Exchange) -> None:
        models = [
            {"model": model, "prefix": stats}
            for model, stats in self._gateway.cache_stats().items()
        ]
        body = msgspec.json.encode({"object": "cache.stats", "models": models})
        await exchange.respond(200, body)
