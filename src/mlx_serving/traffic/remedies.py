"""What is done about a service level that is not kept, and how it is undone.

A ladder: while a level is violated its remedies are applied one after the other, each given time to
work; once every level that a remedy serves has been kept for a while, it is taken back, the last one
first. `choose` is the pure decision; `levels.Levels` acts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from mlx_serving.config import Remedy
from mlx_serving.traffic.slo import AtRisk, MetricName, Ok, State, Violated

REMEDIES: tuple[Remedy, ...] = get_args(Remedy)
"""roll_back: running rollouts end; shed_low, shed_normal: requests of that class and below are
refused with 503; limit_admission: fewer requests are open at once, by half each time;
smaller_chunks: prompts are computed in smaller pieces, by half each time; lower_ceiling,
raise_ceiling: fewer sequences, or more, are computed at once, by a quarter less or twice as many;
raise_class: the requests that a level is about go one class higher each time; evict_idle: a model
that nobody uses leaves memory, for sequences that wait for it."""

_WAITING: frozenset[MetricName] = frozenset({"ttft", "queue", "duration"})
_DECODING: frozenset[MetricName] = frozenset({"tpot", "throughput"})
SERVES: Mapping[Remedy, frozenset[MetricName]] = {
    "roll_back": _WAITING | _DECODING | {"errors"},
    "shed_low": _WAITING | _DECODING,
    "shed_normal": _WAITING | _DECODING,
    "limit_admission": _WAITING | _DECODING,
    "smaller_chunks": _DECODING,
    "lower_ceiling": _DECODING,
    "raise_ceiling": _WAITING,
    "raise_class": _WAITING,
    "evict_idle": _WAITING,
}
COOL_DOWN_S = 30.0
"""Between two acts: what was done must have had time to work."""
HOLD_S = 120.0
"""How long every level that a remedy serves must have been kept before it is taken back. After a
relapse within that time it waits twice as long, so that nothing swings."""
MAX_HOLD_S = 1920.0
MOST: Mapping[Remedy, int] = {
    "limit_admission": 4,
    "smaller_chunks": 3,
    "lower_ceiling": 4,
    "raise_ceiling": 3,
    "raise_class": 3,
    "evict_idle": 4,
}
"""How often a remedy may be in force at once; those that are not here work once."""
AGAINST: Mapping[Remedy, Remedy] = {
    "lower_ceiling": "raise_ceiling",
    "raise_ceiling": "lower_ceiling",
}
"""What is not applied while this is in force: two levels at odds must not pull to and fro."""


@dataclass(frozen=True, slots=True)
class Applied:
    remedy: Remedy
    because: str
    """The objective."""
    at_s: float
    hold_s: float = HOLD_S


@dataclass(frozen=True, slots=True)
class Apply:
    remedy: Remedy
    because: str


@dataclass(frozen=True, slots=True)
class TakeBack:
    applied: Applied


@dataclass(frozen=True, slots=True)
class Wait:
    pass


Act = Apply | TakeBack | Wait


@dataclass(frozen=True, slots=True)
class Watched:
    """A level as the decision sees it."""

    text: str
    metric: MetricName
    state: State


def choose(
    levels: Sequence[Watched],
    ladder: Sequence[Remedy],
    applied: Sequence[Applied],
    *,
    now_s: float,
    last_act_s: float,
    calm_since_s: float,
) -> Act:
    """What to do now.

    Args:
        ladder: the remedies that could do something, in the order in which they are tried.
        applied: those in force, the oldest first.
        last_act_s: when something was last done.
        calm_since_s: since when no level has been violated.
    """
    violated = [level for level in levels if isinstance(level.state, Violated)]
    if violated and now_s - last_act_s >= COOL_DOWN_S:
        for level in violated:
            for remedy in ladder:
                if level.metric in SERVES[remedy] and _may(remedy, applied):
                    return Apply(remedy, level.text)
    if applied and all(isinstance(level.state, Ok | AtRisk) for level in levels):
        last = applied[-1]
        calm_s = now_s - max(calm_since_s, last_act_s)
        if calm_s >= last.hold_s:
            return TakeBack(last)
    return Wait()


def _may(remedy: Remedy, applied: Sequence[Applied]) -> bool:
    """A rollback is never taken back, but a later canary may be rolled back as well."""
    in_force = [one.remedy for one in applied]
    return in_force.count(remedy) < MOST.get(remedy, 1) and AGAINST.get(remedy) not in in_force


def hold_after(
    previous: Applied | None, now_s: float, taken_back_s: float, long_s: float = 0.0
) -> float:
    """How long the next one holds: twice as long when it follows its own taking back closely. A relapse
    shows in the objective's long window, of `long_s`, and may need as long."""
    if previous is None or now_s - taken_back_s > previous.hold_s + long_s:
        return HOLD_S
    return min(MAX_HOLD_S, 2 * previous.hold_s)
