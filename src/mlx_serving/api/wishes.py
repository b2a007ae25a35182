"""What a request's headers wish for, and what the answer's say of it; the same for every dialect."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from mlx_serving.api.exchange import Exchange, Headers
from mlx_serving.api.port import Generation
from mlx_serving.types import Caching, GenerateRequest


def apply(exchange: Exchange, request: GenerateRequest) -> GenerateRequest:
    """The request with what its headers say."""
    caching = _caching(exchange)
    return msgspec.structs.replace(request, caching=caching) if caching != "use" else request


def _caching(exchange: Exchange) -> Caching:
    """`cache-control`, of whose directives only no-store and no-cache mean something here."""
    given = (exchange.header(b"cache-control") or b"").lower()
    directives = {part.strip() for part in given.split(b",")}
    if b"no-store" in directives:
        return "none"
    return "refresh" if b"no-cache" in directives else "use"


def reused(generations: Sequence[Generation]) -> Headers:
    """`x-mlx-cache: hit | shared | miss`, where it was looked whether the work was done already."""
    kinds = {generation.reused for generation in generations}
    kind = kinds.pop() if len(kinds) == 1 else "miss"
    return [] if kind is None else [(b"x-mlx-cache", kind.encode("ascii"))]
