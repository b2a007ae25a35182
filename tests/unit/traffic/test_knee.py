from __future__ import annotations

import math
import random

import pytest

from mlx_serving.traffic.knee import (
    FIRST_S,
    HOLD_S,
    MAX_HOLD_S,
    TRIAL_S,
    Seen,
    Settled,
    Trying,
    is_full,
    step,
    summary,
    token_ms,
)

MOST, NOW = 16, 1000.0
KNOWN = Settled(8, Seen(8, 20.0), due_s=NOW)
CAME = Settled(8, Seen(8, 20.0), due_s=NOW, came="down")
BACK = Settled(8, Seen(8, 20.0), NOW + FIRST_S, "down")


@pytest.mark.parametrize(
    ("state", "seen", "limit_ms", "after"),
    [
        # A look at where it stands, and then a trial.
        (Settled(8), Seen(8, 20.0), math.inf, Settled(8, Seen(8, 20.0), NOW)),
        (KNOWN, Seen(8, 20.0), math.inf, Trying(12, KNOWN, NOW)),
        (Settled(8, Seen(8, 20.0), NOW, "down"), Seen(8, 20.0), math.inf, Trying(5, Settled(8, Seen(8, 20.0), NOW, "down"), NOW)),
        # Not yet, nothing to go by, and nowhere to go.
        (Settled(8, Seen(8, 20.0), NOW + 1), Seen(8, 20.0), math.inf, Settled(8, Seen(8, 20.0), NOW + 1)),
        (KNOWN, None, math.inf, KNOWN),
        (Settled(16, Seen(16, 20.0), NOW), Seen(16, 20.0), math.inf, Settled(16, Seen(16, 20.0), NOW + FIRST_S, "down")),
        (Settled(1, Seen(1, 20.0), NOW, "down"), Seen(1, 20.0), math.inf, Settled(1, Seen(1, 20.0), NOW + HOLD_S, "up", 2 * HOLD_S)),
        # Half as many again: what it must bring.
        (Trying(12, KNOWN, NOW), Seen(12, 20.0), math.inf, Settled(12, Seen(12, 20.0), NOW + FIRST_S, came="up")),
        (Trying(12, KNOWN, NOW), Seen(12, 26.0), math.inf, Settled(12, Seen(12, 26.0), NOW + FIRST_S, came="up")),
        (Trying(12, KNOWN, NOW), Seen(12, 28.5), math.inf, BACK),
        (Trying(12, KNOWN, NOW), Seen(12, 40.0), math.inf, BACK),
        (Trying(12, KNOWN, NOW), Seen(12, 26.0), 25.0, BACK),
        # Fewer: what it may cost.
        (Trying(5, Settled(8, Seen(8, 20.0), NOW, "down"), NOW), Seen(5, 12.0), math.inf, Settled(5, Seen(5, 12.0), NOW + FIRST_S, "down", came="down")),
        # To where it came from: not again soon.
        (Trying(12, CAME, NOW), Seen(12, 20.0), math.inf, Settled(12, Seen(12, 20.0), NOW + 2 * HOLD_S, "up", 2 * HOLD_S, "up")),
        (Trying(5, Settled(8, Seen(8, 20.0), NOW, "down"), NOW), Seen(5, 15.0), math.inf, Settled(8, Seen(8, 20.0), NOW + HOLD_S, "up", 2 * HOLD_S)),
        # Too little to do for a trial.
        (Trying(12, KNOWN, NOW), None, math.inf, Trying(12, KNOWN, NOW)),
        (Trying(12, KNOWN, NOW - TRIAL_S), None, math.inf, BACK),
        (Trying(12, KNOWN, NOW), Seen(8, 20.0), math.inf, BACK),
        # Over the limit: fewer at once, and back the later the oftener.
        (KNOWN, Seen(8, 20.0), 19.0, Settled(5, None, NOW + 2 * HOLD_S, "up", 2 * HOLD_S)),
        (Settled(8, Seen(8, 20.0), NOW, "up", MAX_HOLD_S), Seen(8, 20.0), 19.0, Settled(5, None, NOW + MAX_HOLD_S, "up", MAX_HOLD_S)),
        (Settled(1, Seen(1, 20.0), NOW + 9), Seen(1, 20.0), 19.0, Settled(1, Seen(1, 20.0), NOW + 9)),
        # The curve is another: it begins anew.
        (Settled(8, Seen(8, 20.0), NOW + 500, "up", 320.0), Seen(8, 30.0), math.inf, Settled(8, Seen(8, 30.0), NOW + FIRST_S)),
        (Settled(8, Seen(8, 30.0), NOW + 500, "up", 320.0), Seen(8, 20.0), math.inf, Settled(8, Seen(8, 20.0), NOW + FIRST_S)),
    ],
)  # fmt: skip
def test_decisions(state, seen, limit_ms, after):
    assert step(state, seen, MOST, limit_ms, NOW) == after


@pytest.mark.parametrize(
    ("ceiling", "rows", "full"),
    [(1, 1, True), (1, 2, False), (4, 3, False), (4, 4, True), (10, 8, True), (10, 7, False), (10, 11, False)],
)  # fmt: skip
def test_what_says_something_of_a_ceiling(ceiling, rows, full):
    assert is_full(ceiling, rows) == full


def test_what_prompts_cost_is_taken_off():
    rng = random.Random(3)
    steps = [
        (rows, tokens, 20.0 + 0.5 * tokens + rng.gauss(0, 0.2))
        for rows, tokens in [(8, 0), (7, 30), (8, 60)] * 8
    ]
    steps[0] = (8, 0, 300.0)
    each = token_ms(steps, None)
    assert each == pytest.approx(0.5, abs=0.01)
    found = summary(steps, each)
    assert found.step_ms == pytest.approx(20.0, abs=0.5)
    assert found.rows == pytest.approx(7.67, abs=0.05)
    alike = [(2, 30, 10.0)] * 24
    assert token_ms(alike, None) is None and token_ms(alike, 0.2) == 0.2
    assert summary(alike, None) == Seen(2.0, 10.0)
    assert summary(alike, 0.2) == Seen(2.0, 4.0)


def test_it_never_leaves_its_bounds():
    for ceiling in range(1, MOST + 1):
        for toward in ("up", "down"):
            found = step(
                Settled(ceiling, Seen(ceiling, 9.0), NOW, toward),
                Seen(ceiling, 9.0),
                MOST,
                math.inf,
                NOW,
            )
            assert 1 <= found.ceiling <= MOST


def test_trials_that_fail_come_ever_more_seldom():
    state, now_s, began = Settled(8), 0.0, []
    while now_s < 5000.0:
        before, now_s = state, now_s + 1.0
        # At twice the rows it takes twice as long, and at half of them as well.
        ms = 20.0 if state.ceiling == 8 else 20.0 * 2
        state = step(state, Seen(state.ceiling, ms), MOST, math.inf, now_s)
        if isinstance(state, Trying) and isinstance(before, Settled):
            began.append(now_s)
    assert len(began) < 30
    assert began[-1] - began[-3] > MAX_HOLD_S * 0.9
