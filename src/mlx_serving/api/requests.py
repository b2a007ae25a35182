"""The requests that are under way, and POST /v1/requests/{id}/cancel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from mlx_serving.api.access import caller
from mlx_serving.api.exchange import Exchange
from mlx_serving.errors import RequestNotFound

PREFIX = "/v1/requests/"
SUFFIX = "/cancel"


class RequestRoutes:
    """Knows every exchange from its first line to its last byte; connections bound them."""

    def __init__(self) -> None:
        self._under_way: set[Exchange] = set()

    @contextmanager
    def tracked(self, exchange: Exchange) -> Iterator[None]:
        self._under_way.add(exchange)
        try:
            yield
        finally:
            self._under_way.discard(exchange)

    async def cancel(self, exchange: Exchange) -> None:
        """Cancel what runs under an id: the answer's own (`chatcmpl-...`) or the x-request-id."""
        wanted = exchange.path.removeprefix(PREFIX).removesuffix(SUFFIX)
        found = [
            other
            for other in self._under_way
            if other.generations
            and not other.answered
            and wanted in (other.id, other.call_id)
            # One key's holder has no say in another's requests.
            and (other.client == exchange.client or caller.get().admin)
        ]
        if not found:
            raise RequestNotFound(f"No request '{wanted[:200]}' is running.")
        for other in found:
            for generation in other.generations:
                generation.cancel()
        body = {"id": wanted, "object": "request", "cancelled": True}
        await exchange.respond(200, msgspec.json.encode(body))
