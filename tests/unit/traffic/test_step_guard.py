from __future__ import annotations

import itertools
import random

import pytest

from mlx_serving.traffic.step_guard import (
    COOL_DOWN_S,
    HOLD_S,
    MAX_HOLD_S,
    WINDOW_STEPS,
    Bypassed,
    Degraded,
    Enabled,
    Seen,
    step,
)

NOW_S, MOST = 1000.0, 16
LONG_AGO_S = 100.0
SLOW, FAST = WINDOW_STEPS, 0
AT_8 = Degraded(8, LONG_AGO_S, LONG_AGO_S)


def degraded(ceiling, hold_s=HOLD_S, raised=False):
    return Degraded(ceiling, NOW_S, NOW_S, hold_s, raised)


@pytest.mark.parametrize(
    ("state", "seen", "after"),
    [
        (Enabled(), Seen(FAST, 16), Enabled()),
        (Enabled(), Seen(WINDOW_STEPS // 2, 16), Enabled()),
        (Enabled(), Seen(WINDOW_STEPS // 2 + 1, 16), degraded(12)),
        (Enabled(), Seen(SLOW, 2), degraded(1)),
        (Enabled(), Seen(SLOW, 1), Enabled()),
        (Enabled(NOW_S - 5), Seen(SLOW, 8), degraded(6, 2 * HOLD_S)),
        (Enabled(LONG_AGO_S, MAX_HOLD_S), Seen(SLOW, 8), degraded(6, HOLD_S)),
        (Enabled(NOW_S - 5, MAX_HOLD_S), Seen(SLOW, 8), degraded(6, MAX_HOLD_S)),
        (AT_8, Seen(SLOW, 8), degraded(6)),
        (AT_8, Seen(SLOW, 4), degraded(3)),
        # Those from before are still there, or it is alone.
        (AT_8, Seen(SLOW, 12), Degraded(8, LONG_AGO_S, NOW_S)),
        (AT_8, Seen(SLOW, 1), Degraded(8, LONG_AGO_S, NOW_S)),
        (Degraded(8, NOW_S - 1, NOW_S - 1), Seen(SLOW, 8), Degraded(8, NOW_S - 1, NOW_S)),
        # Quiet for long enough: some more, and at last as many as before.
        (AT_8, Seen(FAST, 8), Degraded(10, NOW_S, LONG_AGO_S, HOLD_S, True)),
        (Degraded(14, LONG_AGO_S, 0), Seen(FAST, 8), Enabled(NOW_S, HOLD_S)),
        (Degraded(8, LONG_AGO_S, NOW_S - 5), Seen(FAST, 8), Degraded(8, LONG_AGO_S, NOW_S - 5)),
        (Degraded(8, NOW_S - 5, 0), Seen(FAST, 8), Degraded(8, NOW_S - 5, 0)),
        # Too many again after some more were let in: held for longer.
        (
            Degraded(10, NOW_S - COOL_DOWN_S, 0, HOLD_S, True),
            Seen(SLOW, 10),
            degraded(7, 2 * HOLD_S),
        ),
        (Bypassed(4), Seen(SLOW, 16), Bypassed(4)),
    ],
)
def test_what_becomes_of_a_state(state, seen, after):
    assert step(state, seen, MOST, NOW_S) == after


def simulate(seed, bearable, until_s=4000.0):
    """The states of a server whose steps are within the limit up to `bearable(now_s)` sequences."""
    rng, now_s, states = random.Random(seed), 0.0, [(0.0, Enabled())]
    while now_s < until_s:
        state = states[-1][1]
        rows = state.ceiling if isinstance(state, Degraded) else MOST
        chance = 0.95 if rows > bearable(now_s) else 0.05
        seen = Seen(sum(rng.random() < chance for _ in range(WINDOW_STEPS)), rows)
        now_s += 1.0
        after = step(state, seen, MOST, now_s)
        if after != state:
            states.append((now_s, after))
    return states


@pytest.mark.parametrize("seed", range(5))
def test_it_finds_what_can_be_borne_and_gives_it_back(seed):
    states = simulate(seed, lambda now_s: 5 if now_s < 1000 else MOST)
    while_slow = [s.ceiling for at_s, s in states if at_s < 1000 and isinstance(s, Degraded)]
    assert min(while_slow) in (3, 4, 5)
    assert isinstance(states[-1][1], Enabled)


@pytest.mark.parametrize("seed", range(5))
def test_it_does_not_swing(seed):
    """What cannot be borne is tried ever more seldom."""
    states = simulate(seed, lambda _: 5)

    def tries(from_s, to_s):
        at_once = [(at_s, s.ceiling) for at_s, s in states if isinstance(s, Degraded)]
        steps = itertools.pairwise(at_once)
        return sum(from_s <= at_s < to_s and after > before for (_, before), (at_s, after) in steps)

    assert tries(0, 1000) >= 1
    assert tries(3000, 4000) <= 1 + 1000 / MAX_HOLD_S
