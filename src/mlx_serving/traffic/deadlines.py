"""How long a request may take: until it is begun, until its first token, altogether. The decision."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from mlx_serving.config import Config
from mlx_serving.errors import DeadlineExceeded, MLXServingError, Overloaded, TimedOut

BUSY_RETRY_S = 5.0


@dataclass(frozen=True, slots=True)
class TimeLimits:
    """Seconds from a request's arrival; None: no limit."""

    queue_s: float | None = None
    first_token_s: float | None = None
    total_s: float | None = None
    asked_s: float | None = None
    """Altogether, by the request's own `timeout`."""

    @classmethod
    def of(cls, config: Config) -> TimeLimits:
        return cls(config.queue_timeout_s, config.first_token_timeout_s, config.request_timeout_s)

    def asked(self, timeout_s: float | None) -> TimeLimits:
        return self if timeout_s is None else replace(self, asked_s=timeout_s)

    def next_s(self, age_s: float) -> float | None:
        """How old the request is when it has to be looked at next; None: never."""
        limits = (self.queue_s, self.first_token_s, self.total_s, self.asked_s)
        return min((s for s in limits if s is not None and s > age_s), default=None)


def overdue(
    limits: TimeLimits, age_s: float, *, begun: bool, answered: bool
) -> MLXServingError | None:
    """Why a request has to end; None lets it go on.

    `begun`: something of it has been computed; `answered`: it has a token.
    """
    if limits.asked_s is not None and age_s >= limits.asked_s:
        return exceeded(limits.asked_s)
    if limits.total_s is not None and age_s >= limits.total_s:
        return TimedOut(f"The request took over {limits.total_s:g} s, the server's limit.")
    if answered:
        return None
    if limits.first_token_s is not None and age_s >= limits.first_token_s:
        return TimedOut(
            f"The request had no token after {limits.first_token_s:g} s, the server's limit."
        )
    if not begun and limits.queue_s is not None and age_s >= limits.queue_s:
        return Overloaded(
            f"The request waited for {limits.queue_s:g} s and was not begun.",
            code="queue_timeout",
            retry_after_s=BUSY_RETRY_S,
        )
    return None


def exceeded(timeout_s: float) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"The answer was not complete within the {timeout_s:g} s that 'timeout' allows.",
        param="timeout",
    )


@asynccontextmanager
async def within(timeout_s: float | None) -> AsyncIterator[None]:
    """Raises DeadlineExceeded when what is awaited here takes longer."""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError:
        assert timeout_s is not None
        raise exceeded(timeout_s) from None
