"""The ASGI application: which path goes where, and what becomes of every error.

Bare ASGI: a table of exact paths and one of prefixes. What a route does not raise as a typed error
is ours: logged with the request's id, answered with a 500 that shows nothing of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from mlx_serving import __version__, clock
from mlx_serving.api import access
from mlx_serving.api.access import Handler, Route, admin, public
from mlx_serving.api.anthropic import AnthropicRoutes
from mlx_serving.api.anthropic_response import error_json as anthropic_error
from mlx_serving.api.anthropic_response import model_list
from mlx_serving.api.cache import CacheRoutes
from mlx_serving.api.embeddings import EmbeddingRoutes
from mlx_serving.api.exchange import (
    ASGIApp,
    ClientGone,
    Exchange,
    Headers,
    Receive,
    Scope,
    Send,
    cut_short,
    internal_error,
)
from mlx_serving.api.guard import Guard
from mlx_serving.api.keys import Keyring, load_keys
from mlx_serving.api.ollama import GREETING, MANAGING, OllamaRoutes
from mlx_serving.api.ollama_embed import OllamaEmbedRoutes
from mlx_serving.api.ollama_response import error_json as ollama_error
from mlx_serving.api.openai import OpenAIRoutes
from mlx_serving.api.port import GatewayPort
from mlx_serving.api.requests import RequestRoutes
from mlx_serving.api.responses import ResponsesRoutes
from mlx_serving.api.rollouts import RolloutRoutes
from mlx_serving.api.settings import SettingsRoutes
from mlx_serving.api.tokens import TokenRoutes
from mlx_serving.errors import InvalidRequest, MLXServingError, ModelNotFound
from mlx_serving.types import ServedModel
from mlx_serving.unknown import left_out

Methods = Mapping[str, Handler | Route]
"""A bare handler needs a key, where there are keys; `public` and `admin` mark what differs."""

HTML = b"text/html; charset=utf-8"
PAGE_HEADERS: Headers = [
    (
        b"content-security-policy",
        b"default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    ),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
]
MODEL_ACTIONS = ("load", "unload", "pin", "unpin")
PROMETHEUS = b"text/plain; version=0.0.4; charset=utf-8"

log = logging.getLogger(__name__)


class RouteNotFound(MLXServingError):
    status, type, code = 404, "invalid_request_error", "not_found"


class MethodNotAllowed(InvalidRequest):
    status, code = 405, "method_not_allowed"


def create_app(gateway: GatewayPort) -> ASGIApp:
    """The application over `gateway`. Raises ConfigError where the API keys cannot be read."""
    live, config = gateway.live, gateway.live.config
    keyring = load_keys(config)
    live.own(keyring.prepare)
    rollouts = RolloutRoutes(gateway)
    gateway = Guard(gateway, keyring)
    openai, info = OpenAIRoutes(gateway), InfoRoutes(gateway)
    anthropic, ollama = AnthropicRoutes(gateway), OllamaRoutes(gateway)
    responses, tokens = ResponsesRoutes(gateway), TokenRoutes(gateway)
    embeddings, ollama_embed = EmbeddingRoutes(gateway), OllamaEmbedRoutes(gateway)
    requests, cache = RequestRoutes(), CacheRoutes(gateway)
    settings = SettingsRoutes(gateway)
    exact: Mapping[str, Methods] = {
        "/": {"GET": public(info.index)},
        "/health": {"GET": public(info.health)},
        "/ready": {"GET": public(info.ready)},
        "/metrics": {"GET": Route(info.metrics, config.metrics_access)},
        "/v1/models": {"GET": info.models},
        "/v1/chat/completions": {"POST": openai.chat_completions},
        "/v1/completions": {"POST": openai.completions},
        "/v1/responses": {"POST": responses.create},
        "/v1/messages": {"POST": anthropic.messages},
        "/v1/messages/count_tokens": {"POST": anthropic.count_tokens},
        "/v1/embeddings": {"POST": embeddings.embed},
        "/v1/rerank": {"POST": embeddings.rerank},
        "/v2/rerank": {"POST": embeddings.rerank},
        "/rerank": {"POST": embeddings.rerank},
        "/v1/rollouts": {"GET": admin(rollouts.all), "POST": admin(rollouts.start)},
        "/tokenize": {"POST": tokens.tokenize},
        "/detokenize": {"POST": tokens.detokenize},
        "/v1/cache/stats": {"GET": admin(cache.stats)},
        "/v1/cache": {"DELETE": admin(cache.clear)},
        "/v1/admin/config": {"GET": admin(settings.show), "PATCH": admin(settings.change)},
        "/v1/admin/reload": {"POST": admin(settings.reload)},
        "/openapi.json": {"GET": public(info.openapi)},
        "/docs": {"GET": public(info.docs)},
        "/api/chat": {"POST": ollama.chat},
        "/api/generate": {"POST": ollama.generate},
        "/api/embed": {"POST": ollama_embed.embed},
        "/api/embeddings": {"POST": ollama_embed.embeddings},
        "/api/tags": {"GET": ollama.tags},
        "/api/ps": {"GET": ollama.ps},
        "/api/show": {"POST": ollama.show},
        "/api/version": {"GET": ollama.version},
    }
    prefixes: Mapping[str, Methods] = {
        **{f"/v1/models/*/{action}": {"POST": admin(info.act)} for action in MODEL_ACTIONS},
        "/v1/models/": {"GET": info.model},
        "/v1/responses/": {"GET": responses.retrieve, "DELETE": responses.delete},
        "/v1/requests/*/cancel": {"POST": requests.cancel},
        "/v1/rollouts/*/promote": {"POST": admin(rollouts.promote)},
        "/v1/rollouts/*/rollback": {"POST": admin(rollouts.roll_back)},
        "/v1/rollouts/*/scores": {"POST": admin(rollouts.score)},
        "/v1/rollouts/": {"GET": admin(rollouts.one), "DELETE": admin(rollouts.remove)},
    }
    table = Table(exact, prefixes, keyring, over_uds=config.uds is not None)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
        else:
            exchange = Exchange(scope, receive, send)
            left_out.set([] if live.config.unknown_fields == "warn" else None)
            with requests.tracked(exchange):
                await _answer(exchange, table)

    return app


@dataclass(frozen=True, slots=True)
class Table:
    """Every route, and who may take it."""

    exact: Mapping[str, Methods]
    prefixes: Mapping[str, Methods]
    """What a path begins with and, after a `*`, ends with."""
    keyring: Keyring
    over_uds: bool

    def methods(self, path: str) -> Methods:
        """Raises RouteNotFound."""
        found = self.exact.get(path)
        if found is None:
            found = next((m for p, m in self.prefixes.items() if _begins(path, p)), None)
        if found is None:
            raise RouteNotFound(f"There is no '{path[:200]}' here; {self._hint(path)}")
        return found

    def _hint(self, path: str) -> str:
        if path in MANAGING or path.startswith("/api/blobs/"):
            return "models are fetched, made and removed by 'mlx-serving pull', 'convert' and 'rm'."
        near = next((p for p in ("/v1" + path, path[len("/v1") :]) if p in self.exact), None)
        return f"did you mean '{near}'?" if near else "'/' lists what is."

    def admit(self, exchange: Exchange, route: Route) -> None:
        """Set the caller for what follows in this task. Raises Unauthorized, Forbidden."""
        who = access.identify(exchange, self.keyring, over_uds=self.over_uds)
        error = access.refusal(route.access, who, self.keyring)
        if error is not None:
            raise error
        exchange.client = who.key.name if who.key else None
        access.caller.set(who)


def _begins(path: str, pattern: str) -> bool:
    prefix, _, suffix = pattern.partition("*")
    # They have a slash each: one in the path is not both.
    fits = len(path) >= len(prefix) + len(suffix)
    return fits and path.startswith(prefix) and path.endswith(suffix)


async def _answer(exchange: Exchange, table: Table) -> None:
    started_s = clock.monotonic()
    if exchange.path.startswith("/api/"):
        exchange.error_shape = ollama_error
    elif exchange.path.startswith("/v1/messages"):
        exchange.error_shape = anthropic_error
    try:
        await _route(exchange, table)
    except ClientGone:
        pass
    except MLXServingError as error:
        await exchange.respond_error(error)
    except asyncio.CancelledError:
        # The server cuts this request; the task ends here, as it would by raising.
        if exchange.status is None:
            await exchange.respond_error(cut_short())
    except Exception:
        log.exception("[%s] %s %r failed", exchange.id, exchange.method, exchange.path)
        if exchange.status is None:
            await exchange.respond_error(internal_error(exchange.id))
    if log.isEnabledFor(logging.DEBUG):
        status = exchange.status or "client gone"
        elapsed_ms = (clock.monotonic() - started_s) * 1e3
        line = "[%s] %s %r -> %s in %.1f ms"
        log.debug(line, exchange.id, exchange.method, exchange.path, status, elapsed_ms)


async def _route(exchange: Exchange, table: Table) -> None:
    methods = table.methods(exchange.path)
    # The server sends no body to HEAD by itself.
    handler = methods.get("GET" if exchange.method == "HEAD" else exchange.method)
    if handler is None:
        allowed = ", ".join(methods)
        error = MethodNotAllowed(f"'{exchange.path[:200]}' takes {allowed}.")
        await exchange.respond_error(error, [(b"allow", allowed.encode("ascii"))])
        return
    route = handler if isinstance(handler, Route) else Route(handler)
    table.admit(exchange, route)
    await route.handler(exchange)


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        kind = (await receive())["type"]
        await send({"type": kind + ".complete"})
        if kind == "lifespan.shutdown":
            return


class InfoRoutes:
    """What there is to read: models, health, metrics, and where everything is."""

    def __init__(self, gateway: GatewayPort) -> None:
        self._gateway = gateway

    async def index(self, exchange: Exchange) -> None:
        """What there is; Ollama's clients look for Ollama's greeting."""
        if (exchange.header(b"user-agent") or b"").startswith(b"ollama"):
            await exchange.respond(
                200, GREETING.encode(), content_type=b"text/plain; charset=utf-8"
            )
        else:
            await _json(exchange, 200, _INDEX)

    async def health(self, exchange: Exchange) -> None:
        """Always 200 while the gateway lives; the body tells the truth."""
        await _json(exchange, 200, self._gateway.health())

    async def ready(self, exchange: Exchange) -> None:
        health = self._gateway.health()
        await _json(exchange, 200 if health["status"] == "ready" else 503, health)

    async def metrics(self, exchange: Exchange) -> None:
        await exchange.respond(200, self._gateway.metrics(), content_type=PROMETHEUS)

    async def openapi(self, exchange: Exchange) -> None:
        from mlx_serving.api import openapi  # few ask for it

        await exchange.respond(200, openapi.document(ENDPOINTS))

    async def docs(self, exchange: Exchange) -> None:
        from mlx_serving.api import openapi  # few ask for it

        await exchange.respond(200, openapi.page(ENDPOINTS), PAGE_HEADERS, HTML)

    async def models(self, exchange: Exchange) -> None:
        usable = exchange.flag("usable")
        models = [
            served
            for served in self._gateway.models()
            if usable is None or usable == (served.status != "failed")
        ]
        if exchange.header(b"anthropic-version") is not None:
            await _json(exchange, 200, model_list(models))
        else:
            await _json(exchange, 200, {"object": "list", "data": [_model(m) for m in models]})

    async def model(self, exchange: Exchange) -> None:
        wanted = exchange.path.removeprefix("/v1/models/")
        for served in self._gateway.models():
            if wanted == served.id or wanted in served.aliases:
                await _json(exchange, 200, _model(served))
                return
        raise ModelNotFound(f"Model '{wanted[:200]}' is not served here.", param="model")

    async def act(self, exchange: Exchange) -> None:
        """Answers with the model as it then is; a load or an unload is waited for."""
        model, _, action = exchange.path.removeprefix("/v1/models/").rpartition("/")
        match action:
            case "load":
                served = await self._gateway.load(model, anew=True)
            case "unload":
                served = await self._gateway.unload(model)
            case _:
                served = self._gateway.pin(model, action == "pin")
        await _json(exchange, 200, _model(served))


ENDPOINTS = (
    ("POST /v1/chat/completions", "OpenAI chat completions, streamed or not"),
    ("POST /v1/completions", "OpenAI completions, streamed or not"),
    ("POST /v1/responses", "OpenAI responses, streamed or not"),
    ("GET /v1/responses/{id}", "a stored response"),
    ("DELETE /v1/responses/{id}", "forget a stored response"),
    ("POST /v1/messages", "Anthropic messages, streamed or not"),
    ("POST /v1/messages/count_tokens", "how many tokens a message's prompt has"),
    ("POST /v1/embeddings", "OpenAI embeddings: vectors of texts"),
    ("POST /v1/rerank", "documents in order of relevance, as Jina, Cohere and vLLM have it"),
    ("POST /v2/rerank", "the same, where Cohere's clients look for it"),
    ("POST /rerank", "the same"),
    ("POST /api/embed", "Ollama's vectors of texts"),
    ("POST /api/embeddings", "Ollama's vector of one text, as older clients ask for it"),
    ("POST /api/chat", "Ollama chat, streamed unless asked otherwise"),
    ("POST /api/generate", "Ollama generate, streamed unless asked otherwise"),
    ("GET /api/tags", "the served models, as Ollama lists them"),
    ("POST /api/show", "one model, as Ollama describes it"),
    ("GET /api/ps", "the loaded models, as Ollama lists them"),
    ("GET /api/version", "the version of Ollama's protocol"),
    ("POST /tokenize", "the token ids of a text or a chat"),
    ("POST /detokenize", "the text of token ids"),
    ("POST /v1/requests/{id}/cancel", "cancel a running request by its id or x-request-id"),
    ("GET /v1/rollouts", "every canary, A/B test and shadow, with its figures; admin"),
    ("POST /v1/rollouts", "have a variant take a share of a model's traffic; admin"),
    ("GET /v1/rollouts/{name}", "one of them; admin"),
    ("POST /v1/rollouts/{name}/promote", "the variant answers everything from here on; admin"),
    ("POST /v1/rollouts/{name}/rollback", "the model answers everything from here on; admin"),
    ("POST /v1/rollouts/{name}/scores", "what a judge says of one answer; admin"),
    ("DELETE /v1/rollouts/{name}", "forget it; admin"),
    ("GET /v1/models", "the configured models, broken ones with the cause; ?usable=true: without"),
    ("GET /v1/models/{id}", "one served model"),
    ("POST /v1/models/{id}/load", "bring a model into memory, and wait for it; admin"),
    ("POST /v1/models/{id}/unload", "take it out once its running requests have ended; admin"),
    ("POST /v1/models/{id}/pin", "never unload it to make room or for idleness; admin"),
    ("POST /v1/models/{id}/unpin", "let it be unloaded again; admin"),
    ("GET /health", "what the server and its workers are doing; always 200"),
    ("GET /ready", "200 when requests can be answered now, else 503"),
    ("GET /v1/cache/stats", "what the prefix caches hold and did (admin)"),
    ("DELETE /v1/cache", "empty the prefix caches, in memory and on disk (admin)"),
    ("GET /v1/admin/config", "the settings in force, and which can change now; admin"),
    ("PATCH /v1/admin/config", "change settings while the server runs, all or none; admin"),
    ("POST /v1/admin/reload", "read the settings anew, and take over what differs; admin"),
    ("GET /metrics", "Prometheus metrics"),
    ("GET /openapi.json", "this API as an OpenAPI document"),
    ("GET /docs", "every endpoint and field, on one page"),
)
_INDEX = {
    "name": "mlx-serving",
    "version": __version__,
    "about": "Language models served with MLX behind OpenAI's, Anthropic's and Ollama's APIs.",
    "ollama": GREETING,
    "openai_base_url": "/v1",
    "anthropic_base_url": "/",
    "endpoints": dict(ENDPOINTS),
}


def _model(served: ServedModel) -> dict[str, object]:
    return {
        "id": served.id,
        "object": "model",
        "created": served.created,
        "owned_by": "mlx-serving",
        "status": served.status,
        "reason": served.reason,
        "cause": served.cause,
        "aliases": served.aliases,
        "parent": served.parent,
        "context_length": served.context_length,
        "pinned": served.pinned,
        "expires_in_s": served.expires_in_s,
        "wired_bytes": served.wired_bytes,
        "not_wired": served.not_wired,
    }


async def _json(exchange: Exchange, status: int, value: object) -> None:
    await exchange.respond(status, msgspec.json.encode(value))
