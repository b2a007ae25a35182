"""When to start the next worker: back-off, and a circuit breaker over a window of deaths.

    closed ──max_deaths within window_s──▶ open ──its time is over──▶ half-open ──probe──▶ closed
                                             ▲                            │
                                             └──────── died again ────────┘

Pure functions over a tagged union, so that a table can test them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    window_s: float = 60.0
    max_deaths: int = 5
    """So many deaths within `window_s` are a crash loop."""
    base_s: float = 0.5
    """Delay after the second death in a window; doubles from there. The first costs none."""
    max_s: float = 30.0
    open_s: float = 10.0
    """How long the breaker stays open at first; doubles each time that its probe fails."""
    max_open_s: float = 300.0
    jitter: float = 0.25
    """Delays are drawn up to this share longer, lest several servers start in step."""


@dataclass(frozen=True, slots=True)
class Closed:
    """Workers are restarted, and traffic goes to them."""

    deaths_s: tuple[float, ...] = ()
    """When workers died, within the window, oldest first."""


@dataclass(frozen=True, slots=True)
class Open:
    """A crash loop: no worker is started, and new requests are refused, until then."""

    until_s: float
    openings: int


@dataclass(frozen=True, slots=True)
class HalfOpen:
    """A worker is started, and each model has to give a token before traffic returns."""

    openings: int


Breaker = Closed | Open | HalfOpen


@dataclass(frozen=True, slots=True)
class Wait:
    """What to do after a death: stand like `breaker` for `in_s`, then start the next worker."""

    breaker: Closed | Open
    in_s: float


def after_death(
    policy: BreakerPolicy, breaker: Closed | HalfOpen, now_s: float, draw: float
) -> Wait:
    """`draw`: a random number from 0 to 1, which places the delay within the jitter."""
    longer = 1.0 + policy.jitter * draw
    match breaker:
        case HalfOpen(openings):
            return _open(policy, openings + 1, now_s, longer)
        case Closed(deaths_s):
            recent = (*(at_s for at_s in deaths_s if now_s - at_s < policy.window_s), now_s)
            if len(recent) >= policy.max_deaths:
                return _open(policy, 1, now_s, longer)
            in_s = 0.0
            if len(recent) > 1:
                in_s = min(policy.max_s, policy.base_s * 2.0 ** (len(recent) - 2)) * longer
            return Wait(Closed(recent), in_s)


def after_wait(breaker: Closed | Open) -> Closed | HalfOpen:
    return HalfOpen(breaker.openings) if isinstance(breaker, Open) else breaker


def after_probe(breaker: Closed | HalfOpen) -> Closed:
    """The worker is ready: its models are loaded and, where the breaker asked, have answered."""
    return Closed() if isinstance(breaker, HalfOpen) else breaker


def _open(policy: BreakerPolicy, openings: int, now_s: float, longer: float) -> Wait:
    in_s = min(policy.max_open_s, policy.open_s * 2.0 ** (openings - 1)) * longer
    return Wait(Open(now_s + in_s, openings), in_s)
