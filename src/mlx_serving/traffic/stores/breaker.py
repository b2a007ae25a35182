"""When to leave a store alone that fails: pure functions over a tagged union.

closed ──MAX_FAILURES in a row──▶ open ──its time is over, one call tries──▶ closed
                                    ▲──────────── failed again ────────────────┘
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_FAILURES = 3
OPEN_S = 1.0
MAX_OPEN_S = 30.0


@dataclass(frozen=True, slots=True)
class Closed:
    failures: int = 0
    """In a row."""


@dataclass(frozen=True, slots=True)
class Open:
    until_s: float
    for_s: float


Breaker = Closed | Open


def attempt(breaker: Breaker, now_s: float) -> Breaker | None:
    """The state to try in; None: do not. Of those that come once an open one's time is over, the
    first tries, and holds the others off for as long again."""
    match breaker:
        case Closed():
            return breaker
        case Open(until_s, for_s):
            return Open(now_s + for_s, for_s) if now_s >= until_s else None


def failed(tried: Breaker, breaker: Breaker, now_s: float) -> Breaker:
    """`tried`: the state that the failed call was let through in. What began before the breaker
    opened says nothing about whether the store is back."""
    match breaker:
        case Open() if isinstance(tried, Closed):
            return breaker
        case Closed(failures) if failures + 1 < MAX_FAILURES:
            return Closed(failures + 1)
        case Closed():
            return Open(now_s + OPEN_S, OPEN_S)
        case Open(_, for_s):
            for_s = min(MAX_OPEN_S, 2 * for_s)
            return Open(now_s + for_s, for_s)
