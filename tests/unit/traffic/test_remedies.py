from __future__ import annotations

import pytest

from mlx_serving.traffic.remedies import (
    HOLD_S,
    MAX_HOLD_S,
    REMEDIES,
    SERVES,
    Applied,
    Apply,
    TakeBack,
    Wait,
    Watched,
    choose,
    hold_after,
)
from mlx_serving.traffic.slo import AtRisk, Ok, Recovering, Violated

SLOW = Watched("ttft p95 < 1s", "ttft", Violated(0))
FAILING = Watched("errors < 1%", "errors", Violated(0))
FINE = Watched("tpot p95 < 1s", "tpot", Ok())
SHED, LIMIT = Applied("shed_low", SLOW.text, 0), Applied("limit_admission", SLOW.text, 0)
TIGHT = Watched("tpot p95 < 1ms", "tpot", Violated(0))
WORKER = ("smaller_chunks", "lower_ceiling", "raise_ceiling")
SMALL, LOWER, RAISE = (Applied(name, TIGHT.text, 0) for name in WORKER)


def later(levels, applied=(), ladder=REMEDIES, *, last_act_s=0.0, calm_since_s=0.0, now_s=1000.0):
    return choose(
        levels, ladder, applied, now_s=now_s, last_act_s=last_act_s, calm_since_s=calm_since_s
    )


@pytest.mark.parametrize(
    ("levels", "applied", "ladder", "expected"),
    [
        ([FINE], (), REMEDIES, Wait()),
        ([SLOW], (), ["evict_idle"], Apply("evict_idle", SLOW.text)),
        ([TIGHT], (), ["evict_idle"], Wait()),
        ([FINE, SLOW], (), ["shed_low"], Apply("shed_low", SLOW.text)),
        ([SLOW], (SHED,), ["shed_low"], Wait()),
        ([SLOW], (SHED,), ["shed_low", "shed_normal"], Apply("shed_normal", SLOW.text)),
        ([SLOW], (LIMIT,), ["limit_admission"], Apply("limit_admission", SLOW.text)),
        ([SLOW], (LIMIT,) * 4, ["limit_admission"], Wait()),
        ([SLOW], (), [], Wait()),
        ([TIGHT], (), WORKER, Apply("smaller_chunks", TIGHT.text)),
        ([TIGHT], (SMALL,) * 3, WORKER, Apply("lower_ceiling", TIGHT.text)),
        ([TIGHT], (SMALL,) * 3 + (LOWER,) * 4, WORKER, Wait()),
        ([SLOW], (), WORKER, Apply("raise_ceiling", SLOW.text)),
        ([SLOW], (LOWER,), WORKER, Wait()),
        ([SLOW, TIGHT], (RAISE,) * 3, ["lower_ceiling", "raise_ceiling"], Wait()),
        ([FAILING], (), ["shed_low", "limit_admission"], Wait()),
        ([FAILING], (), REMEDIES, Apply("roll_back", FAILING.text)),
        ([FINE], (SHED, LIMIT), REMEDIES, TakeBack(LIMIT)),
        ([Watched("x", "ttft", AtRisk())], (SHED,), REMEDIES, TakeBack(SHED)),
        ([Watched("x", "ttft", Recovering(0, 1))], (SHED,), REMEDIES, Wait()),
    ],
)
def test_what_is_done(levels, applied, ladder, expected):
    assert later(levels, applied, ladder) == expected


def test_an_act_is_given_time():
    assert later([SLOW], last_act_s=980.0) == Wait()
    assert later([FINE], (SHED,), calm_since_s=1000.0 - HOLD_S / 2) == Wait()
    assert later([FINE], (SHED,), last_act_s=1000.0 - HOLD_S / 2) == Wait()


def test_a_relapse_is_met_for_longer():
    assert hold_after(None, 0, 0) == HOLD_S
    assert hold_after(SHED, 1000.0, 990.0) == 2 * HOLD_S
    assert hold_after(SHED, 1000.0, 500.0) == HOLD_S
    assert hold_after(SHED, 1000.0, 500.0, long_s=600.0) == 2 * HOLD_S
    assert hold_after(Applied("shed_low", "x", 0, MAX_HOLD_S), 1000.0, 990.0) == MAX_HOLD_S


def test_every_remedy_serves_something():
    assert set(SERVES) == set(REMEDIES) and all(SERVES.values())
