"""Anthropic's /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from functools import partial

import msgspec

from mlx_serving.api import drive
from mlx_serving.api.anthropic_request import parse_count, parse_messages
from mlx_serving.api.anthropic_response import FRAMING, MessageWriter, message
from mlx_serving.api.exchange import Exchange, Headers
from mlx_serving.api.port import GatewayPort


class AnthropicRoutes:
    def __init__(self, gateway: GatewayPort) -> None:
        self._gateway = gateway
        self._live = gateway.live

    async def messages(self, exchange: Exchange) -> None:
        body = await exchange.body(self._live.config.max_body_bytes)
        call = parse_messages(body, default_model=self._gateway.default_model())
        model, show = call.request.model, call.show_thinking
        await drive.serve(
            exchange,
            self._gateway,
            self._live.config,
            call.request,
            answer=lambda generation, whole: message(generation, model, whole, show_thinking=show),
            writer=partial(MessageWriter, model=model, show_thinking=show) if call.stream else None,
            framing=FRAMING,
            advisory=call.advisory,
            headers=_request_id(exchange),
        )

    async def count_tokens(self, exchange: Exchange) -> None:
        body = await exchange.body(self._live.config.max_body_bytes)
        model, prompt, advisory = parse_count(body, default_model=self._gateway.default_model())
        count = len(await self._gateway.tokenise(model, prompt))
        headers = drive.advised(advisory) + _request_id(exchange)
        await exchange.respond(200, msgspec.json.encode({"input_tokens": count}), headers)


def _request_id(exchange: Exchange) -> Headers:
    """The name by which Anthropic's clients know it."""
    return [(b"request-id", exchange.id.encode("ascii"))]
