"""What web pages may do with this server: nothing, unless their origin is named.

A page can send requests to any address that its reader's machine reaches. So a request that says
that it comes from another origin is refused (not only left without CORS headers: a POST has done its
work by then), and so is one to a loopback server by another name than its own (DNS rebinding).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from mlx_serving.api.access import is_loopback
from mlx_serving.api.exchange import (
    ASGIApp,
    ASGIMessage,
    Exchange,
    Headers,
    Receive,
    Scope,
    Send,
    header,
)
from mlx_serving.config import Config
from mlx_serving.errors import Forbidden
from mlx_serving.live import Apply, LiveSettings

PREFLIGHT_S = 600
_METHODS = b"GET, POST, PUT, PATCH, DELETE, OPTIONS"
_EXPOSED = (
    b"x-request-id, x-mlx-serving-seed, x-mlx-serving-advisory, x-mlx-serving-ignored, "
    b"x-mlx-cache, x-mlx-variant, x-mlx-flags, x-should-retry, retry-after"
)


@dataclass(frozen=True, slots=True)
class Policy:
    origins: Collection[str]
    """Origins that pages may come from, besides the server's own."""
    hosts: Collection[str] | None
    """Names that a loopback server goes by besides loopback's own; None: any."""


def policy(config: Config) -> Policy:
    checked = config.uds is None and is_loopback(config.host)
    return Policy(
        origins=frozenset(origin.rstrip("/").lower() for origin in config.cors_origin),
        hosts=frozenset(host.lower() for host in config.allowed_host) if checked else None,
    )


def refusal(rules: Policy, host: str | None, origin: str | None) -> Forbidden | None:
    """None lets the request in. `host` and `origin` are its headers."""
    if rules.hosts is not None and host is not None:
        name = host_name(host)
        if not is_loopback(name) and name not in rules.hosts:
            return Forbidden(
                f"This server listens on loopback and is not called '{name[:200]}': --allowed-host "
                "names what it may be called.",
                code="host_not_allowed",
            )
    if origin is None or origin.lower() in rules.origins or _is_own(origin, host):
        return None
    return Forbidden(
        f"Pages of '{origin[:200]}' may not use this server: --cors-origin names those that may.",
        code="origin_not_allowed",
    )


def host_name(host: str) -> str:
    """A Host header's name, without the port and the brackets of IPv6."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _is_own(origin: str, host: str | None) -> bool:
    """The page came from this server (`/docs`)."""
    scheme, _, rest = origin.partition("://")
    return scheme in ("http", "https") and host is not None and rest.lower() == host.lower()


class Rules:
    """The policy in force."""

    def __init__(self, live: LiveSettings) -> None:
        self.policy = policy(live.config)
        live.own(self._prepare)

    def _prepare(self, wanted: Config) -> Apply:
        async def apply() -> None:
            self.policy = policy(wanted)

        return apply


def keeping_out(app: ASGIApp, policies: Callable[[], Policy]) -> ASGIApp:
    """`app` behind the policy in force, with CORS headers for the origins that are named."""

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        rules = policies()
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        host, origin = _text(scope, b"host"), _text(scope, b"origin")
        error = refusal(rules, host, origin)
        if error is not None:
            await Exchange(scope, receive, send).respond_error(error)
        elif origin is None or origin.lower() not in rules.origins:
            await app(scope, receive, send)
        elif scope["method"] == "OPTIONS":
            await Exchange(scope, receive, send).respond(204, b"", _preflight(scope, origin))
        else:
            await app(scope, receive, _with_headers(send, _cors(origin)))

    return checked


def _text(scope: Scope, name: bytes) -> str | None:
    value = header(scope, name)
    return None if value is None else value.decode("latin-1")


def _cors(origin: str) -> Headers:
    return [
        (b"access-control-allow-origin", origin.encode("latin-1")),
        (b"access-control-expose-headers", _EXPOSED),
        (b"vary", b"origin"),
    ]


def _preflight(scope: Scope, origin: str) -> Headers:
    wanted = header(scope, b"access-control-request-headers") or b"authorization, content-type"
    return [
        *_cors(origin),
        (b"access-control-allow-methods", _METHODS),
        (b"access-control-allow-headers", wanted[:1024]),
        (b"access-control-max-age", b"%d" % PREFLIGHT_S),
    ]


def _with_headers(send: Send, headers: Headers) -> Send:
    async def adding(message: ASGIMessage) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], *headers]
        await send(message)

    return adding
