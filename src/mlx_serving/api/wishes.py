"""What a request's headers wish for, and what the answer's say of it; the same for every dialect."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from mlx_serving.api.exchange import Exchange, Headers
from mlx_serving.api.port import Generation
from mlx_serving.types import Caching, GenerateRequest

MAX_SESSION_CHARS = 256


def apply(exchange: Exchange, request: GenerateRequest) -> GenerateRequest:
    """The request with what its headers say."""
    caching, session = _caching(exchange), _session(exchange)
    if caching == "use" and session is None:
        return request
    return msgspec.structs.replace(request, caching=caching, session=session or request.session)


def _caching(exchange: Exchange) -> Caching:
    """`cache-control`, of whose directives only no-store and no-cache mean something here."""
    given = (exchange.header(b"cache-control") or b"").lower()
    directives = {part.strip() for part in given.split(b",")}
    if b"no-store" in directives:
        return "none"
    return "refresh" if b"no-cache" in directives else "use"


def _session(exchange: Exchange) -> str | None:
    """`x-session-id`: whose requests should be answered by one variant."""
    given = (exchange.header(b"x-session-id") or b"").strip()
    return given.decode("utf-8", "replace")[:MAX_SESSION_CHARS] or None


def variant(generations: Sequence[Generation]) -> Headers:
    """`x-mlx-variant: MODEL`, where a rollout had another model answer."""
    names = {generation.variant for generation in generations} - {None}
    return [(b"x-mlx-variant", name.encode()) for name in sorted(filter(None, names))]


def reused(generations: Sequence[Generation]) -> Headers:
    """`x-mlx-cache: hit | shared | miss`, where it was looked whether the work was done already."""
    kinds = {generation.reused for generation in generations}
    kind = kinds.pop() if len(kinds) == 1 else "miss"
    return [] if kind is None else [(b"x-mlx-cache", kind.encode("ascii"))]
