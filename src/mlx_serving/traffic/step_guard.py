"""Whether a model's steps are too slow for as many sequences as it decodes at once: a pure decision.

            most steps over the limit              as many sequences as before
    Enabled ──────────────────────────▶ Degraded ──────────────────────────────▶ Enabled
                                         │  ▲ still over: fewer; quiet for a while: some more
                                         └──┘
    Bypassed: the number is fixed by hand.

What follows a return too soon is held twice as long, so that nothing swings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import assert_never

WINDOW_STEPS = 16
"""Steps that are judged together: over the limit if more than half of them are."""
COOL_DOWN_S = 2.0
"""Between two lowerings."""
HOLD_S = 15.0
"""How long steps must have been within the limit before one degree is taken back."""
MAX_HOLD_S = 120.0


@dataclass(frozen=True, slots=True)
class Enabled:
    """As many sequences as the model was loaded for. `hold_s`: of the last time that it was not."""

    name = "enabled"
    since_s: float = -math.inf
    hold_s: float = HOLD_S


@dataclass(frozen=True, slots=True)
class Degraded:
    name = "degraded"
    ceiling: int
    at_s: float
    """When it was last changed."""
    over_s: float
    """When steps were last over the limit."""
    hold_s: float = HOLD_S
    raised: bool = False
    """The last change was upwards."""


@dataclass(frozen=True, slots=True)
class Bypassed:
    name = "bypassed"
    ceiling: int


State = Enabled | Degraded | Bypassed


@dataclass(frozen=True, slots=True)
class Seen:
    """The last `WINDOW_STEPS` steps that decoded. `rows`: the most that one of them had."""

    over: int
    rows: int


def step(state: State, seen: Seen, most: int, now_s: float) -> State:
    """The next state. `most`: sequences that the model may decode at once."""
    over = 2 * seen.over > WINDOW_STEPS
    match state:
        case Bypassed():
            return state
        case Enabled(since_s, hold_s):
            if not over or seen.rows <= 1:
                return state  # one sequence alone is as fast as it gets
            held_s = _longer(hold_s) if now_s - since_s <= hold_s else HOLD_S
            return Degraded(_fewer(min(seen.rows, most)), now_s, now_s, held_s)
        case Degraded():
            return _lower(state, seen, now_s) if over else _raise(state, most, now_s)
        case _:
            assert_never(state)


def _lower(state: Degraded, seen: Seen, now_s: float) -> State:
    """Rows that are still there from before have to end first."""
    draining = seen.rows > state.ceiling or now_s - state.at_s < COOL_DOWN_S
    if draining or seen.rows <= 1:
        return replace(state, over_s=now_s)
    hold_s = _longer(state.hold_s) if state.raised else state.hold_s
    return Degraded(_fewer(min(seen.rows, state.ceiling)), now_s, now_s, hold_s)


def _raise(state: Degraded, most: int, now_s: float) -> State:
    if now_s - max(state.at_s, state.over_s) < state.hold_s:
        return state
    ceiling = state.ceiling + max(1, most // 8)
    if ceiling >= most:
        return Enabled(now_s, state.hold_s)
    return replace(state, ceiling=ceiling, at_s=now_s, raised=True)


def _fewer(rows: int) -> int:
    return max(1, rows * 3 // 4)


def _longer(hold_s: float) -> float:
    return min(MAX_HOLD_S, 2 * hold_s)
