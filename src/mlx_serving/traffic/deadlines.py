"""How long a request may take: until it is begun, until its first token, altogether. The decision."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_serving.errors import MLXServingError, Overloaded, TimedOut

BUSY_RETRY_S = 5.0


@dataclass(frozen=True, slots=True)
class TimeLimits:
    """Seconds from a request's arrival; None: no limit."""

    queue_s: float | None = None
    first_token_s: float | None = None
    total_s: float | None = None

    def next_s(self, age_s: float) -> float | None:
        """How old the request is when it has to be looked at next; None: never."""
        limits = (self.queue_s, self.first_token_s, self.total_s)
        return min((s for s in limits if s is not None and s > age_s), default=None)


def overdue(
    limits: TimeLimits, age_s: float, *, begun: bool, answered: bool
) -> MLXServingError | None:
    """Why a request has to end; None lets it go on.

    `begun`: something of it has been computed; `answered`: it has a token.
    """
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
