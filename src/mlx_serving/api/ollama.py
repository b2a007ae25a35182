"""Ollama's /api: chat, generate, and what there is to know of the models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from mlx_serving import __version__, clock
from mlx_serving.api import drive
from mlx_serving.api import ollama_response as response
from mlx_serving.api.body import read_object, spelled
from mlx_serving.api.exchange import Exchange
from mlx_serving.api.ollama_request import OllamaCall, parse_chat, parse_generate
from mlx_serving.api.port import GatewayPort
from mlx_serving.api.sse import NDJSON
from mlx_serving.errors import InvalidRequest, ModelNotFound
from mlx_serving.types import ServedModel

PROTOCOL = "0.12.11"
"""The version of Ollama whose requests these are; clients ask for the features of one."""
GREETING = "Ollama is running"
MANAGING = ("/api/pull", "/api/push", "/api/create", "/api/copy", "/api/delete")
"""What Ollama does to models over HTTP, and this server does not."""


class OllamaRoutes:
    def __init__(self, gateway: GatewayPort) -> None:
        self._gateway = gateway
        self._live = gateway.live

    async def chat(self, exchange: Exchange) -> None:
        await self._serve(exchange, "chat", parse_chat)

    async def generate(self, exchange: Exchange) -> None:
        await self._serve(exchange, "generate", parse_generate)

    async def tags(self, exchange: Exchange) -> None:
        models = [response.entry(m, self._gateway.model_info(m.id)) for m in self._gateway.models()]
        await _json(exchange, {"models": models})

    async def ps(self, exchange: Exchange) -> None:
        found = [(m, self._gateway.model_info(m.id)) for m in self._gateway.models()]
        models = [response.running(m, info) for m, info in found if info is not None]
        await _json(exchange, {"models": models})

    async def show(self, exchange: Exchange) -> None:
        body = read_object(await exchange.body(self._live.config.max_body_bytes))
        name = body.get("model") or body.get("name")
        if not isinstance(name, str):
            raise InvalidRequest("'model' must be a string.", param="model")
        served = self._find(name)
        if served is None:
            raise ModelNotFound(f"model '{name[:200]}' not found", param="model")
        info, abilities = self._gateway.model_info(served.id), self._gateway.abilities(served.id)
        await _json(exchange, response.shown(served, info, abilities))

    async def version(self, exchange: Exchange) -> None:
        await _json(exchange, {"version": PROTOCOL, "mlx_serving": __version__})

    async def _serve(
        self, exchange: Exchange, route: response.Route, parse: Callable[..., OllamaCall]
    ) -> None:
        started_s = clock.monotonic()
        body = await exchange.body(self._live.config.max_body_bytes)
        call = parse(body, default_model=self._gateway.default_model())
        reply = response.Reply(route, call.model, started_s)
        served = self._find(call.model)
        model = served.id if served else call.model
        if call.request is None:
            leaves = call.keep_alive_s == 0
            if leaves:
                await self._gateway.unload(model)
            else:
                await self._gateway.load(model, call.keep_alive_s)
            await exchange.respond(200, reply.loaded(leaves), drive.advised(call.advisory))
            return
        with spelled(("messages", "messages" if route == "chat" else "prompt")):
            await drive.serve(
                exchange,
                self._gateway,
                self._live.config,
                msgspec.structs.replace(call.request, model=model),
                answer=reply.whole,
                writer=reply.writer if call.stream else None,
                framing=NDJSON,
                advisory=call.advisory,
            )

    def _find(self, name: str) -> ServedModel | None:
        """The model of that name, or of that name without `:latest`."""
        for wanted in (name, name.removesuffix(":latest")):
            for served in self._gateway.models():
                if wanted == served.id or wanted in served.aliases:
                    return served
        return None


async def _json(exchange: Exchange, value: Any) -> None:
    await exchange.respond(200, msgspec.json.encode(value))
