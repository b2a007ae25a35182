"""What to do when a worker has died: a pure function, so that a table can test it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    base_s: float = 0.5
    """Delay before the second restart in a row; doubles from there. The first is immediate."""
    max_s: float = 30.0
    quick_s: float = 10.0
    """A worker that was ready for less long than this died quickly."""
    give_up_after: int = 6
    """Quick deaths in a row."""


@dataclass(frozen=True, slots=True)
class Restart:
    attempt: int
    """Counts quick deaths in a row; 1 after a worker that had lived well."""
    in_s: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    deaths: int


def after_death(policy: RestartPolicy, ready_s: float, attempt: int) -> Restart | GiveUp:
    """`ready_s`: how long the worker that died had been ready, 0 if it never was; `attempt`: the
    restart it came from, 0 for the first start."""
    quick = ready_s < policy.quick_s
    if quick and attempt + 1 >= policy.give_up_after:
        return GiveUp(attempt + 1)
    attempt = attempt + 1 if quick else 1
    if attempt == 1:
        return Restart(1, 0.0)
    return Restart(attempt, min(policy.max_s, policy.base_s * 2.0 ** (attempt - 2)))
