"""Answers in a Redis or Valkey server that several of ours share.

How much it keeps, and which entries leave first, is that server's `maxmemory` and `maxmemory-policy`;
`bounds` says how large one entry may be and how long it lives.
"""

from __future__ import annotations

from typing import Any

from mlx_serving.errors import ConfigError
from mlx_serving.traffic.stores.port import Bounds, StoreError

PREFIX = b"mlx-serving:answer:"
TIMEOUT_S = 0.25
"""An answer that takes longer to find is better computed."""


class RedisStore:
    def __init__(self, bounds: Bounds, url: str) -> None:
        from redis.asyncio import Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        self.bounds = bounds
        try:
            self._client: Any = Redis.from_url(
                url,
                socket_timeout=TIMEOUT_S,
                socket_connect_timeout=TIMEOUT_S,
                retry=Retry(NoBackoff(), 0),  # the breaker decides when to try again
                max_connections=64,
            )
        except ValueError as error:
            raise ConfigError(f"response_cache_url: {error}", param="response_cache_url") from None

    async def get(self, key: bytes) -> bytes | None:
        found: bytes | None = await self._do("get", PREFIX + key.hex().encode())
        return found

    async def put(self, key: bytes, value: bytes, tokens: int) -> None:
        if self.bounds.admit(tokens, len(value)):
            ttl_ms = max(1, int(self.bounds.ttl_s * 1e3))
            await self._do("set", PREFIX + key.hex().encode(), value, px=ttl_ms)

    async def drop(self, key: bytes) -> None:
        await self._do("delete", PREFIX + key.hex().encode())

    def size(self) -> None:
        return None

    async def close(self) -> None:
        await self._client.aclose()

    async def _do(self, command: str, *args: object, **options: object) -> Any:
        from redis.exceptions import RedisError

        try:
            return await getattr(self._client, command)(*args, **options)
        except (RedisError, OSError) as error:
            raise StoreError(f"{type(error).__name__}: {error}") from error
