"""How many sequences at once a model computes best: a pure decision from what its decoding steps took.

                 some time has passed            as many tokens/s, or more
    Settled ────────────────────────▶ Trying ────────────────────────────▶ Settled there
       ▲     up, and where that fails    │ not worth it, or none came
       │     the next time down          ▼
       └─────────────────────────── Settled as before, for twice as long

Rows are worth having while tokens/s grow with them: where half as many again bring less than a tenth more
they are not (`WORTH_UP`), and where a third fewer cost next to nothing they go (`WORTH_DOWN`). What lies
between the two bounds is left alone, and a trial that failed is made again ever more seldom, so that
nothing swings. A step longer than `limit_ms` takes rows away at once. Where a step has come to take another
time than it did, the search begins anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Literal, assert_never

WINDOW_STEPS = 32
"""Steps with rows enough that are judged together, by their median."""
FULL = 0.8
"""Of the ceiling: with fewer rows a step says nothing of it."""
WORTH_UP = 0.24
WORTH_DOWN = 0.16
"""d log(tokens/s) / d log(rows): 1 below the knee of a curve, 0 beyond it."""
FIRST_S = 2.0
"""Before the trial that follows one that was worth it."""
HOLD_S = 20.0
"""Before the trial that follows one that was not; after each further one twice as long."""
MAX_HOLD_S = 640.0
TRIAL_S = 30.0
"""A trial for which there is too little to do is given up."""
MOVED = 0.2
"""A step's time that differs by so much is that of another curve."""

Direction = Literal["up", "down"]
Step = tuple[int, int, float]
"""Rows that decoded, prompt tokens computed beside them, milliseconds."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A window of steps."""

    rows: float
    """That decoded, on average."""
    step_ms: float
    """What decoding them took."""


@dataclass(frozen=True, slots=True)
class Settled:
    ceiling: int
    seen: Seen | None = None
    """What was seen here last; None: not enough yet."""
    due_s: float = -math.inf
    """When the next trial may begin."""
    toward: Direction = "up"
    """Where it goes."""
    hold_s: float = HOLD_S
    came: Direction | None = None
    """The last trial that was worth it."""


@dataclass(frozen=True, slots=True)
class Trying:
    ceiling: int
    home: Settled
    began_s: float


State = Settled | Trying


def is_full(ceiling: int, rows: int) -> bool:
    """Whether a step with so many rows says something of the ceiling."""
    return FULL * ceiling <= rows <= ceiling


def token_ms(steps: Sequence[Step], before: float | None) -> float | None:
    """What a prompt token adds to a step, by comparing steps with each other (the median of their slopes,
    Theil and Sen's estimate); `before`: what earlier windows say. None: nothing does."""
    slopes = [
        (ms - other_ms) / (tokens - other_tokens)
        for i, (_, tokens, ms) in enumerate(steps)
        for _, other_tokens, other_ms in steps[:i]
        if tokens != other_tokens
    ]
    if len(slopes) < 2 * WINDOW_STEPS:  # most had as many tokens as the others
        return before
    found = max(0.0, median(slopes))
    return found if before is None else 0.7 * before + 0.3 * found


def summary(steps: Sequence[Step], token_ms: float | None) -> Seen:
    """Of a window, without what its prompt tokens cost."""
    each = token_ms or 0.0
    step_ms = median(ms - each * tokens for _, tokens, ms in steps)
    return Seen(fmean(rows for rows, _, _ in steps), max(1e-3, step_ms))


def step(state: State, seen: Seen | None, most: int, limit_ms: float, now_s: float) -> State:
    """The next state.

    Args:
        seen: the latest window of full steps; None: there has not been enough to do for one.
        most: sequences that the model may compute at once.
        limit_ms: longest step that service levels allow; inf: any.
    """
    match state:
        case Trying(_, home, began_s):
            if seen is not None:
                return _judge(state, seen, limit_ms, now_s)
            return _back(home, now_s) if now_s - began_s >= TRIAL_S else state
        case Settled():
            return state if seen is None else _settled(state, seen, most, limit_ms, now_s)
        case _:
            assert_never(state)


def _settled(state: Settled, seen: Seen, most: int, limit_ms: float, now_s: float) -> State:
    before = state.seen
    if seen.step_ms > limit_ms and state.ceiling > 1:
        # Back up is a trial as any other, and the longer put off the oftener it failed.
        hold_s = min(MAX_HOLD_S, 2 * state.hold_s)
        return Settled(_fewer(state.ceiling), None, now_s + hold_s, "up", hold_s)
    if before is None:
        return replace(state, seen=seen, due_s=max(state.due_s, now_s))
    if abs(math.log(seen.step_ms / before.step_ms)) > MOVED:
        due_s = min(state.due_s, now_s + FIRST_S)
        return Settled(state.ceiling, seen, due_s, state.toward)
    state = replace(state, seen=_blend(before, seen))
    if now_s < state.due_s:
        return state
    ceiling = _more(state.ceiling, most) if state.toward == "up" else _fewer(state.ceiling)
    if ceiling == state.ceiling:
        return _back(state, now_s)
    return Trying(ceiling, state, now_s)


def _judge(state: Trying, seen: Seen, limit_ms: float, now_s: float) -> State:
    home, up = state.home, state.ceiling > state.home.ceiling
    assert home.seen is not None
    rows = math.log(seen.rows / home.seen.rows)
    if rows * (1 if up else -1) <= 0:
        return _back(home, now_s)  # as many as before: the ceiling is not what holds them
    worth = 1 - math.log(seen.step_ms / home.seen.step_ms) / rows
    taken = seen.step_ms <= limit_ms and worth >= WORTH_UP if up else worth <= WORTH_DOWN
    if not taken:
        return _back(home, now_s)
    if home.came not in (None, home.toward):  # to and fro: what lies between is a matter of noise
        hold_s = min(MAX_HOLD_S, 2 * home.hold_s)
        return Settled(state.ceiling, seen, now_s + hold_s, home.toward, hold_s, home.toward)
    return Settled(state.ceiling, seen, now_s + FIRST_S, home.toward, home.hold_s, home.toward)


def _back(home: Settled, now_s: float) -> Settled:
    """The other way is tried next; when both have failed it takes longer."""
    if home.toward == "up":
        return replace(home, toward="down", due_s=now_s + FIRST_S)
    hold_s = min(MAX_HOLD_S, 2 * home.hold_s)
    return replace(home, toward="up", due_s=now_s + home.hold_s, hold_s=hold_s)


def _blend(before: Seen, seen: Seen) -> Seen:
    return Seen(0.7 * before.rows + 0.3 * seen.rows, 0.7 * before.step_ms + 0.3 * seen.step_ms)


def _more(rows: int, most: int) -> int:
    """As many where there is no room for a difference that would show."""
    more = min(most, max(rows + 1, rows * 3 // 2))
    return more if more >= 1.2 * rows else rows


def _fewer(rows: int) -> int:
    return max(1, rows * 2 // 3)
