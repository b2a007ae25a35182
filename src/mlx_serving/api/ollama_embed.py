"""Ollama's /api/embed, and the older /api/embeddings."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from mlx_serving import clock
from mlx_serving.api import ollama_fields as fields
from mlx_serving.api.body import convert, read_object
from mlx_serving.api.disposition import Table, check
from mlx_serving.api.drive import advised
from mlx_serving.api.embeddings import finished
from mlx_serving.api.embeddings_request import ALL, Count, Model
from mlx_serving.api.embeddings_response import numbers
from mlx_serving.api.exchange import Exchange
from mlx_serving.api.ollama_request import kept_s
from mlx_serving.api.port import GatewayPort
from mlx_serving.api.sse import ClientWatch
from mlx_serving.types import MAX_INPUTS, Embeddings, EmbedRequest, TextPrompt

_json = msgspec.json.Encoder().encode


class _Embed(msgspec.Struct, kw_only=True):
    model: Model | None = None
    input: str | Annotated[list[str], Meta(max_length=MAX_INPUTS)] | None = None
    truncate: bool | None = None
    dimensions: Count | None = None
    options: dict[str, Any] | None = None
    keep_alive: float | str | None = None


class _Embeddings(msgspec.Struct, kw_only=True):
    model: Model | None = None
    prompt: str | None = None
    options: dict[str, Any] | None = None
    keep_alive: float | str | None = None


class Vectors(msgspec.Struct):
    """The answer of /api/embed. Durations are in nanoseconds."""

    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class Vector(msgspec.Struct):
    """The answer of /api/embeddings."""

    embedding: list[float]


SHAPES: Mapping[str, type[msgspec.Struct]] = {"/api/embed": _Embed, "/api/embeddings": _Embeddings}
ANSWERS: Mapping[str, type[msgspec.Struct]] = {"/api/embed": Vectors, "/api/embeddings": Vector}


class OllamaEmbedRoutes:
    def __init__(self, gateway: GatewayPort) -> None:
        self._gateway = gateway
        self._live = gateway.live

    async def embed(self, exchange: Exchange) -> None:
        started_s = clock.monotonic()
        raw, advisory = await self._read(exchange, fields.EMBED)
        body = convert(raw, _Embed)
        keep_alive_s = kept_s(body.keep_alive, advisory)
        advisory += check(fields.EMBED_OPTIONS, body.options or {}, at="options.")
        model = self._model(body.model)
        async with ClientWatch(exchange):
            await self._gateway.load(model, keep_alive_s)
            loaded_s = clock.monotonic()
            vectors, tokens = [], 0
            if body.input:
                truncate = None if body.truncate is False else ALL
                single = isinstance(body.input, str)
                texts = [body.input] if isinstance(body.input, str) else body.input
                request = _request(model, texts, "input", single=single)
                request = msgspec.structs.replace(
                    request,
                    truncate=truncate,
                    dimensions=body.dimensions,
                    keep_alive_s=keep_alive_s,
                )
                found = await self._run(exchange, request)
                vectors, tokens = await numbers(found.vectors), found.usage.prompt_tokens
            answer = (
                b'{"model":%s,"embeddings":[%s],"total_duration":%d,"load_duration":%d,'
                b'"prompt_eval_count":%d}'
            ) % (
                _json(body.model or model),
                b",".join(vectors),
                (clock.monotonic() - started_s) * 1e9,
                (loaded_s - started_s) * 1e9,
                tokens,
            )
            await exchange.respond(200, answer, advised(advisory))

    async def embeddings(self, exchange: Exchange) -> None:
        raw, advisory = await self._read(exchange, fields.EMBEDDINGS)
        body = convert(raw, _Embeddings)
        keep_alive_s = kept_s(body.keep_alive, advisory)
        advisory += check(fields.EMBED_OPTIONS, body.options or {}, at="options.")
        model = self._model(body.model)
        async with ClientWatch(exchange):
            vector = b"[]"
            if body.prompt:
                request = _request(model, [body.prompt], "prompt", single=True)
                request = msgspec.structs.replace(
                    request, truncate=ALL, normalize=False, keep_alive_s=keep_alive_s
                )
                (vector,) = await numbers((await self._run(exchange, request)).vectors)
            else:
                await self._gateway.load(model, keep_alive_s)
            await exchange.respond(200, b'{"embedding":%s}' % vector, advised(advisory))

    async def _read(self, exchange: Exchange, table: Table) -> tuple[dict[str, Any], list[str]]:
        raw = read_object(await exchange.body(self._live.config.max_body_bytes))
        return raw, check(table, raw)

    async def _run(self, exchange: Exchange, request: EmbedRequest) -> Embeddings:
        return await finished(exchange, request.request_id, self._gateway.embed(request))

    def _model(self, name: str | None) -> str:
        """The name, without `:latest` unless a model is called that."""
        if name is None:
            return self._gateway.default_model()
        known = {n for served in self._gateway.models() for n in (served.id, *served.aliases)}
        return name if name in known else name.removesuffix(":latest")


def _request(model: str, texts: list[str], param: str, *, single: bool) -> EmbedRequest:
    return EmbedRequest(
        request_id="ollama-" + secrets.token_hex(12),
        model=model,
        inputs=tuple(TextPrompt(text=text) for text in texts),
        param=param,
        single=single,
    )
