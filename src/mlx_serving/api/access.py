"""Who asks, and whether a route is for them."""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal, assert_never

from mlx_serving.api.exchange import Exchange
from mlx_serving.api.keys import Key, Keyring
from mlx_serving.config import Config
from mlx_serving.errors import Forbidden, MLXServingError, Unauthorized

Handler = Callable[[Exchange], Awaitable[None]]
Access = Literal["open", "key", "admin"]
"""open: anybody; key: who has a key, where there are keys; admin: who may change what runs."""


@dataclass(frozen=True, slots=True)
class Route:
    handler: Handler
    access: Access = "key"


def public(handler: Handler) -> Route:
    """A route that needs no key: it reveals nothing of models, prompts or load."""
    return Route(handler, "open")


def admin(handler: Handler) -> Route:
    """A route that needs the admin key or, where there is none, a connection from this machine."""
    return Route(handler, "admin")


@dataclass(frozen=True, slots=True)
class Caller:
    key: Key | None = None
    """None: nobody in particular."""
    admin: bool = False
    local: bool = False
    """The connection comes from this machine, and nobody says that it was forwarded."""
    presented: bool = False
    """Some key was sent, right or wrong."""
    keyed: bool = False
    """The server has keys, or an admin key."""

    @property
    def keeps(self) -> bool:
        """Whether its `keep_alive` counts: a model in memory is everybody's."""
        return self.admin or not self.keyed


caller: ContextVar[Caller] = ContextVar("caller", default=Caller())  # noqa: B039
"""Whose request this task serves; the app sets it before a route's handler runs."""


def identify(exchange: Exchange, keyring: Keyring, *, over_uds: bool) -> Caller:
    """Who sent a request, by its keys and its connection."""
    keys = _presented(exchange)
    admin = any(keyring.is_admin(text) for text in keys)
    found = [key for text in keys if (key := keyring.find(text))]
    return Caller(
        key=found[0] if found and not admin else None,
        admin=admin,
        local=_is_local(exchange, over_uds),
        presented=bool(keys),
        keyed=bool(keyring.keys) or keyring.admin_hash is not None,
    )


def refusal(access: Access, who: Caller, keyring: Keyring) -> MLXServingError | None:
    """None lets the caller in."""
    match access:
        case "open":
            return None
        case "key":
            return None if who.key or who.admin or not keyring.keys else _unauthorized(who)
        case "admin":
            return _admin_refusal(who, keyring)
        case _:
            assert_never(access)


def _admin_refusal(who: Caller, keyring: Keyring) -> MLXServingError | None:
    if who.admin:
        return None
    if keyring.admin_hash is not None:
        if who.key is None:
            return _unauthorized(who)
        return Forbidden("This needs the admin key.", code="admin_key_required")
    if keyring.keys and who.key is None:
        return _unauthorized(who)
    if who.local:
        return None
    return Forbidden(
        "This answers to connections from its own machine only, unless the server has an admin key "
        "(--admin-key).",
        code="admin_key_required",
    )


def _unauthorized(who: Caller) -> Unauthorized:
    if who.presented:
        return Unauthorized("The API key is not one of this server's.")
    return Unauthorized(
        "An API key is needed: 'Authorization: Bearer KEY' or 'x-api-key: KEY'.",
        code="missing_api_key",
    )


def _presented(exchange: Exchange) -> list[str]:
    """Clients of Anthropic's API may send both headers."""
    found: list[str] = []
    scheme, _, token = (exchange.header(b"authorization") or b"").strip().partition(b" ")
    if scheme.lower() == b"bearer" and token.strip():
        found.append(token.strip().decode("utf-8", "replace"))
    if key := (exchange.header(b"x-api-key") or b"").strip():
        found.append(key.decode("utf-8", "replace"))
    return found


_FORWARDED = (b"forwarded", b"x-forwarded-for", b"x-real-ip")


def _is_local(exchange: Exchange, over_uds: bool) -> bool:
    # A proxy on this machine connects from it for anybody.
    if any(exchange.header(name) is not None for name in _FORWARDED):
        return False
    peer = exchange.scope.get("client")
    # No address is no proof: the peer of a closed TCP connection has none either.
    return is_loopback(peer[0]) if peer else over_uds


def exposures(config: Config) -> list[tuple[str, str]]:
    """What its owner should know of a server's openness: codes and sentences."""
    if config.uds is not None or is_loopback(config.host):
        return []
    if not config.api_key and config.api_keys_file is None:
        return [
            (
                "no_api_key",
                f"anybody who reaches {config.host} may use this server: it has no API key "
                "(--api-key, --api-keys-file; docs/security.md)",
            )
        ]
    return []


@functools.lru_cache(maxsize=64)
def is_loopback(host: str) -> bool:
    """Whether an address, or a name to listen on, is this machine's own."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
