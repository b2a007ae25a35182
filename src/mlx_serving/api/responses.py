"""OpenAI's /v1/responses: create, retrieve, delete."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from mlx_serving.api import drive
from mlx_serving.api.body import spelled
from mlx_serving.api.exchange import Exchange
from mlx_serving.api.port import GatewayPort, Generation
from mlx_serving.api.responses_request import parse_response
from mlx_serving.api.responses_response import ResponseWriter, whole
from mlx_serving.api.responses_store import ResponseStore
from mlx_serving.errors import RequestNotFound
from mlx_serving.types import Message

PREFIX = "/v1/responses/"


class ResponsesRoutes:
    def __init__(self, gateway: GatewayPort) -> None:
        self._gateway = gateway
        self._live = gateway.live
        self._store = ResponseStore()

    async def create(self, exchange: Exchange) -> None:
        body = await exchange.body(self._live.config.max_body_bytes)

        def recall(response_id: str) -> Sequence[Message] | None:
            stored = self._store.get(response_id, exchange.client)
            return None if stored is None else stored.messages

        call = parse_response(body, default_model=self._gateway.default_model(), recall=recall)

        def keep(response_id: str, body: bytes, answer: Message) -> None:
            self._store.put(response_id, body, (*call.messages, answer), exchange.client)

        def writer(generation: Generation) -> ResponseWriter:
            return ResponseWriter(generation, call, keep)

        with spelled(("reasoning_effort", "reasoning.effort"), ("messages", "input")):
            await drive.serve(
                exchange,
                self._gateway,
                self._live.config,
                call.request,
                answer=lambda generation, collected: whole(generation, call, keep, collected),
                writer=writer if call.stream else None,
                advisory=call.advisory,
            )

    async def retrieve(self, exchange: Exchange) -> None:
        response_id = exchange.path.removeprefix(PREFIX)
        stored = self._store.get(response_id, exchange.client)
        if stored is None:
            raise _unknown(response_id)
        await exchange.respond(200, stored.body)

    async def delete(self, exchange: Exchange) -> None:
        response_id = exchange.path.removeprefix(PREFIX)
        if not self._store.delete(response_id, exchange.client):
            raise _unknown(response_id)
        body = {"id": response_id, "object": "response.deleted", "deleted": True}
        await exchange.respond(200, msgspec.json.encode(body))


def _unknown(response_id: str) -> RequestNotFound:
    return RequestNotFound(f"Response '{response_id[:100]}' is not stored (any more).")
