"""What one API key may use: requests at once, requests a minute, tokens a minute.

Rates are buckets that hold a minute's worth and fill steadily. Tokens are paid when they are known,
the prompt's at the start and the answer's at the end, so that a bucket may run into debt; a request
enters while there is anything left.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlx_serving.errors import RateLimited

BUSY_RETRY_S = 1.0
"""When to come back where only another request's end can help."""


@dataclass(frozen=True, slots=True)
class Limits:
    """None: no limit."""

    max_concurrent: int | None = None
    requests_per_min: int | None = None
    tokens_per_min: int | None = None


@dataclass(frozen=True, slots=True)
class Left:
    """What the decision looks at: requests that are open, and what the buckets hold."""

    open_requests: int
    requests: float
    tokens: float


def refusal(name: str, limits: Limits, left: Left) -> RateLimited | None:
    """None admits. Otherwise Retry-After is when the bucket will hold what one request needs."""
    if limits.max_concurrent is not None and left.open_requests >= limits.max_concurrent:
        most = f"{limits.max_concurrent} request{'s' if limits.max_concurrent > 1 else ''} at once"
        return _limited(name, most, BUSY_RETRY_S)
    if limits.requests_per_min is not None and left.requests < 1:
        wait_s = (1 - left.requests) * 60 / limits.requests_per_min
        return _limited(name, f"{limits.requests_per_min} requests a minute", wait_s)
    if limits.tokens_per_min is not None and left.tokens <= 0:
        wait_s = (1 - left.tokens) * 60 / limits.tokens_per_min
        return _limited(name, f"{limits.tokens_per_min} tokens a minute", wait_s)
    return None


def _limited(name: str, most: str, wait_s: float) -> RateLimited:
    message = f"The key '{name}' allows {most}."
    return RateLimited(message, code="rate_limit_exceeded", retry_after_s=wait_s)


class Allowance:
    """One key's use."""

    def __init__(self, name: str, limits: Limits) -> None:
        self._name = name
        self._limits = limits
        self._open = 0
        self._requests = _Bucket(limits.requests_per_min)
        self._tokens = _Bucket(limits.tokens_per_min)

    def enter(self, now_s: float) -> None:
        """Count a request in, or raise RateLimited. A caller that enters must leave."""
        left = Left(self._open, self._requests.level(now_s), self._tokens.level(now_s))
        error = refusal(self._name, self._limits, left)
        if error is not None:
            raise error
        self._open += 1
        self._requests.take(1, now_s)

    def spend(self, tokens: int, now_s: float) -> None:
        self._tokens.take(tokens, now_s)

    def leave(self) -> None:
        self._open -= 1
        assert self._open >= 0, "a request left twice"


class _Bucket:
    """Holds a minute's worth; None: never empty."""

    def __init__(self, per_min: int | None) -> None:
        self._per_min = per_min
        self._level = float(per_min or 0)
        self._at_s: float | None = None

    def level(self, now_s: float) -> float:
        if self._per_min is not None and self._at_s is not None:
            filled = self._level + (now_s - self._at_s) * self._per_min / 60
            self._level = min(float(self._per_min), filled)
        self._at_s = now_s
        return self._level

    def take(self, amount: int, now_s: float) -> None:
        if self._per_min is not None:
            self._level = self.level(now_s) - amount
