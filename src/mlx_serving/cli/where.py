"""Where the server is that a command talks to: its flags, or the variables that `serve` reads too."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import httpx

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", "8000"
_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1", "": DEFAULT_HOST}
"""Addresses that are listened on and not connected to."""

Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        show_default=False,
        help="The server; default: MLX_SERVING_HOST and MLX_SERVING_PORT, or http://127.0.0.1:8000.",
    ),
]
Uds = Annotated[
    str | None,
    typer.Option(
        "--uds",
        show_default=False,
        help="The server's Unix domain socket; default: MLX_SERVING_UDS, where no --url is given.",
    ),
]


@dataclass(frozen=True, slots=True)
class Where:
    base: str
    """Its URL, with neither a slash nor /v1 at the end."""
    uds: str | None = None

    def __str__(self) -> str:
        return self.uds or self.base

    def client(self, **options: Any) -> httpx.Client:
        import httpx

        transport = httpx.HTTPTransport(uds=self.uds) if self.uds else None
        return httpx.Client(**{"base_url": self.base, "transport": transport, **options})


def where(
    url: str | None = None, uds: str | None = None, env: Mapping[str, str] = os.environ
) -> Where:
    """Raises typer.BadParameter for what is no URL."""
    if uds is None and url is None:
        uds = env.get("MLX_SERVING_UDS")
    if uds:
        return Where("http://localhost", uds)
    return Where(_checked(url) if url else _listened_on(env))


def _listened_on(env: Mapping[str, str]) -> str:
    """The address that `serve` would take with these variables."""
    host = env.get("MLX_SERVING_HOST", DEFAULT_HOST)
    host = _ANY.get(host, host)
    scheme = "https" if env.get("MLX_SERVING_TLS_CERT") else "http"
    place = f"[{host}]" if ":" in host else host
    return _checked(f"{scheme}://{place}:{env.get('MLX_SERVING_PORT') or DEFAULT_PORT}")


def _checked(url: str) -> str:
    import httpx

    url = url if "://" in url else f"http://{url}"
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise typer.BadParameter(f"'{url}' is no URL: {error}", param_hint="--url") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise typer.BadParameter(f"'{url}' is no URL of a server", param_hint="--url")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")
