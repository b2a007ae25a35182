"""What a request's headers wish for, and what the answer's say of it; the same for every dialect."""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

from mlx_serving.api.exchange import Exchange, Headers
from mlx_serving.api.port import Generation
from mlx_serving.errors import InvalidRequest
from mlx_serving.types import MAX_TIMEOUT_S, Caching, GenerateRequest, Priority

_INTEGER = re.compile(r"-?[0-9]{1,9}")

MAX_SESSION_CHARS = 256


def apply(exchange: Exchange, request: GenerateRequest) -> GenerateRequest:
    """The request with what its headers say; a field of the body says more than a header. Raises
    InvalidRequest naming the header."""
    found: dict[str, object] = {}
    if (caching := _caching(exchange)) != "use":
        found["caching"] = caching
    if (session := _session(exchange)) is not None:
        found["session"] = session
    if request.priority is Priority.NORMAL and (priority := _priority(exchange)) is not None:
        found["priority"] = priority
    if request.timeout_s is None and (timeout_s := _timeout_s(exchange)) is not None:
        found["timeout_s"] = timeout_s
    return msgspec.structs.replace(request, **found) if found else request


def _priority(exchange: Exchange) -> Priority | None:
    given = exchange.header(b"x-priority")
    if given is None:
        return None
    text = given.decode("latin-1").strip()
    return parse_priority(int(text) if _INTEGER.fullmatch(text) else text, param="x-priority")


def parse_priority(value: str | int | None, *, param: str = "priority") -> Priority:
    """A class by name, or vLLM's integers, of which a lower one is sooner. Raises InvalidRequest."""
    if value is None:
        return Priority.NORMAL
    if isinstance(value, str):
        named = Priority.__members__.get(value.upper()) if value.islower() else None
        if named is None:
            raise InvalidRequest(
                f"'{param}' must be critical, high, normal, low or an integer.", param=param
            )
        return named
    if value <= -10:
        return Priority.CRITICAL
    if value < 0:
        return Priority.HIGH
    return Priority.NORMAL if value == 0 else Priority.LOW


def _timeout_s(exchange: Exchange) -> float | None:
    given = exchange.header(b"x-timeout")
    if given is None:
        return None
    try:
        timeout_s = float(given)
    except ValueError:
        timeout_s = 0.0
    if not 0 < timeout_s <= MAX_TIMEOUT_S:
        raise InvalidRequest(
            f"'x-timeout' must be seconds, above 0 and at most {MAX_TIMEOUT_S}.", param="x-timeout"
        )
    return timeout_s


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
    """`x-mlx-variant: MODEL`, where a rollout or a flag had another model answer, and `x-mlx-flags`: the
    feature flags in whose share the request is."""
    names = {generation.variant for generation in generations} - {None}
    said = [(b"x-mlx-variant", name.encode()) for name in sorted(filter(None, names))]
    flags = dict.fromkeys(flag for generation in generations for flag in generation.flags)
    return [*said, (b"x-mlx-flags", ", ".join(flags).encode("ascii"))] if flags else said


def reused(generations: Sequence[Generation]) -> Headers:
    """`x-mlx-cache: hit | shared | miss`, where it was looked whether the work was done already."""
    kinds = {generation.reused for generation in generations}
    kind = kinds.pop() if len(kinds) == 1 else "miss"
    return [] if kind is None else [(b"x-mlx-cache", kind.encode("ascii"))]
