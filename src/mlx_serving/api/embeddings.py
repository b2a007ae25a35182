"""OpenAI's /v1/embeddings, and /v1/rerank as Jina, Cohere and vLLM have it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from mlx_serving.api.drive import advised
from mlx_serving.api.embeddings_request import parse_embeddings, parse_rerank
from mlx_serving.api.embeddings_response import embedding_list, ranked_list
from mlx_serving.api.exchange import Exchange
from mlx_serving.api.port import GatewayPort
from mlx_serving.api.sse import ClientWatch
from mlx_serving.errors import Cancelled

T = TypeVar("T")


class EmbeddingRoutes:
    def __init__(self, gateway: GatewayPort) -> None:
        self._gateway = gateway
        self._live = gateway.live

    async def embed(self, exchange: Exchange) -> None:
        body = await exchange.body(self._live.config.max_body_bytes)
        call = parse_embeddings(body, default_model=self._gateway.default_model())
        async with ClientWatch(exchange):
            running = self._gateway.embed(call.request)
            found = await finished(exchange, call.request.request_id, running)
            answer = await embedding_list(found, base64=call.base64)
            await exchange.respond(200, answer, advised(call.advisory))

    async def rerank(self, exchange: Exchange) -> None:
        body = await exchange.body(self._live.config.max_body_bytes)
        call = parse_rerank(body, default_model=self._gateway.default_model())
        async with ClientWatch(exchange):
            running = self._gateway.rank(call.request)
            found = await finished(exchange, call.request.request_id, running)
            await exchange.respond(200, ranked_list(call, found), advised(call.advisory))


async def finished(exchange: Exchange, call_id: str, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives. Its end is also the exchange's: by its client's leaving, or by its id."""
    task = asyncio.create_task(work)
    running = Running(task)
    exchange.call_id, exchange.generations = call_id, (running,)
    try:
        return await task
    except asyncio.CancelledError:
        if running.cancelled:
            raise Cancelled(f"Request {call_id} was cancelled.") from None
        raise


class Running:
    """port.Cancellable over a task."""

    def __init__(self, task: asyncio.Task[Any]) -> None:
        self.task = task
        self.cancelled = False

    def cancel(self) -> None:
        if not self.task.done():
            self.cancelled = True
            self.task.cancel()
