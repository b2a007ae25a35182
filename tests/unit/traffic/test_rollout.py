from __future__ import annotations

import math
import random
from typing import get_args

import pytest

from mlx_serving.traffic.rollout import (
    METRICS,
    STAGES,
    Advance,
    Figures,
    Hold,
    Promote,
    RollBack,
    Stage,
    comparisons,
    decide,
    estimates,
    stratum,
)
from mlx_serving.traffic.rollouts import MetricName

OK = {"error": 0.0, "empty": 0.0, "capped": 0.0, "malformed": 0.0}


def figures(n: int = 400, *, stage: int = 0, slower: float = 1.0, failing: float = 0.0, **only):
    """`n` requests an arm and stage, the variant's `slower` or `failing` in that part."""
    rng = random.Random(5)
    found = Figures()
    for at in range(stage + 1):
        for variant in (False, True):
            for i in range(only.get("variant_n", n) if variant else n):
                bad = variant and i < failing * n
                factor = slower if variant else 1.0
                values = {"error": 1.0} if bad else dict(OK)
                if not bad:
                    values["ttft"] = rng.gauss(5, 0.3) + math.log(factor)
                    values["tpot"] = rng.gauss(2, 0.2) + math.log(factor)
                    values["tokens_per_s"] = rng.gauss(3, 0.3) - math.log(factor)
                found.add(at, variant, values)
    return found


@pytest.mark.parametrize(
    ("given", "stage", "stage_s", "expected"),
    [
        (figures(), 0, 100.0, Advance(1)),
        (figures(stage=2), 2, 100.0, Advance(3)),
        (figures(stage=3), 3, 100.0, Promote()),
        (figures(), 0, 10.0, Hold),
        (figures(30), 0, 100.0, Hold),
        (figures(variant_n=30), 0, 100.0, Hold),
        (Figures(), 0, 100.0, Hold),
        (figures(slower=1.3), 0, 10.0, RollBack),
        (figures(slower=0.5), 0, 100.0, Advance(1)),
        (figures(failing=0.5), 0, 0.0, RollBack),
        (figures(60, failing=1.0), 0, 0.0, RollBack),
        (figures(10, failing=1.0), 0, 0.0, Hold),
        (figures(340, slower=1.05), 0, 100.0, Hold),
    ],
)
def test_decisions(given, stage, stage_s, expected):
    found = decide(STAGES, stage, stage_s, given)
    if isinstance(expected, type):
        assert isinstance(found, expected), found
    else:
        assert found == expected


@pytest.mark.parametrize(
    ("sequences", "name"),
    [(0.0, "tpot@0"), (1.0, "tpot@0"), (1.2, "tpot@0"), (1.25, "tpot@1"), (2.0, "tpot@3"), (16.0, "tpot@12")],
)  # fmt: skip
def test_strata_of_company(sequences, name):
    assert stratum("tpot", sequences) == name


def test_times_are_compared_between_requests_of_like_company():
    """The variant's requests are mostly alone and the model's are not; at like company both take as
    long."""
    rng, found = random.Random(3), Figures()
    for variant, alone in ((False, 60), (True, 540)):
        for i in range(600):
            sequences = 1.0 if i < alone else 4.0
            ms = rng.gauss(math.log(10 * sequences**0.5), 0.1)
            found.add(0, variant, {**OK, stratum("tpot", sequences): ms})
    assert decide(STAGES, 0, 100.0, found) == Advance(1)
    (tpot,) = [e for m, e in estimates(found, 0.05) if m.name == "tpot"]
    assert abs(tpot.difference) < 0.05
    (test,) = [t for m, t in comparisons(found, 0) if m.name == "tpot"]
    assert abs(test.difference) < 0.05


@pytest.mark.parametrize(("slower", "decision"), [(20.0, RollBack), (1.0, Advance)])
def test_a_variant_whose_requests_pile_up_is_compared_with_those_that_had_no_company(
    slower, decision
):
    rng, found = random.Random(3), Figures()
    for variant in (False, True):
        for _ in range(400):
            sequences = 2.0 if variant else 1.0
            ms = rng.gauss(math.log(10 * (slower if variant else 1.0)), 0.1)
            found.add(0, variant, {**OK, stratum("tpot", sequences): ms})
    assert isinstance(decide(STAGES, 0, 100.0, found), decision)


@pytest.mark.parametrize(("slower", "decision"), [(1.0, Advance), (0.3, Advance), (3.0, RollBack)])
@pytest.mark.parametrize("metric", ["tpot", "tokens_per_s"])
def test_a_rarer_variant_without_company_is_charged_with_no_more_than_it_must(
    metric, slower, decision
):
    """Alone in its steps it can be quicker for that; if it is slower, it is not for that."""
    rng, found = random.Random(3), Figures()
    sign = 1 if metric == "tpot" else -1
    for variant, n, sequences in ((False, 540, 4.0), (True, 60, 1.0)):
        for _ in range(n):
            value = rng.gauss(2, 0.1) + sign * variant * math.log(slower)
            found.add(0, variant, {**OK, stratum(metric, sequences): value})
    stages = [Stage(0.1, min_samples=60), Stage(0.5)]
    assert isinstance(decide(stages, 0, 100.0, found), decision)


@pytest.mark.parametrize(
    ("metric", "share", "decision"),
    [("ttft", 0.5, RollBack), ("ttft", 0.75, Advance), ("tpot", 0.75, RollBack)],
)
def test_a_longer_queue_is_held_against_a_variant_with_no_more_traffic_than_the_model(
    metric, share, decision
):
    """Thirty times as long, with three times the company: in steps it cannot be owed to that."""
    rng, found = random.Random(3), Figures()
    for variant, sequences, factor in ((False, 1.0, 1.0), (True, 3.0, 30.0)):
        for _ in range(100):
            value = rng.gauss(2 + math.log(factor), 0.1)
            found.add(0, variant, {**OK, stratum(metric, sequences): value})
    stages = [Stage(share, min_samples=100), Stage(1.0)]
    assert isinstance(decide(stages, 0, 100.0, found), decision)


def test_a_slow_variant_is_caught_where_too_few_of_each_side_had_like_company():
    """Half of its requests ran beside one another, the others' alone: no stratum has twenty of both."""
    rng, found = random.Random(3), Figures()
    for i in range(30):
        for variant, ms in ((False, 12.0), (True, 210.0)):
            sequences = 2.0 if variant and i % 2 else 1.0
            found.add(0, variant, {**OK, stratum("tpot", sequences): rng.gauss(math.log(ms), 0.1)})
    found_out = decide([Stage(0.5, min_samples=30, min_s=0), Stage(1.0)], 0, 1.0, found)
    assert isinstance(found_out, RollBack) and found_out.metric == "tpot"


def test_a_rollback_names_the_metric_and_by_how_much():
    found = decide(STAGES, 0, 0.0, figures(slower=1.5))
    assert isinstance(found, RollBack)
    assert found.metric in ("ttft", "tpot", "tokens_per_s")
    assert "%" in found.why and "or worse" in found.why
    failing = decide(STAGES, 0, 0.0, figures(failing=0.4))
    assert isinstance(failing, RollBack)
    assert failing.metric == "error" and "points" in failing.why


def test_a_held_stage_says_what_is_in_doubt():
    found = decide(STAGES, 0, 100.0, figures(340, slower=1.05))
    assert isinstance(found, Hold)
    assert "looks +" in found.why


def test_the_last_stage_needs_no_baseline():
    found = Figures()
    for _ in range(300):
        found.add(0, True, OK)
    assert decide([Stage(1.0, min_samples=200, min_s=0)], 0, 1.0, found) == Promote()


def test_each_metric_is_compared_in_its_stage():
    tests = {metric.name: test for metric, test in comparisons(figures(stage=1, slower=1.2), 1)}
    assert {"ttft", "tpot", "tokens_per_s"} <= set(tests)
    assert tests["tpot"].p < 1e-6 and tests["tpot"].d > 0.3


def test_every_metric_says_what_matters():
    assert tuple(metric.name for metric in METRICS) == get_args(MetricName)
    assert all(metric.matters > 0 for metric in METRICS)


def test_only_the_metrics_that_count_decide():
    errors = [metric for metric in METRICS if metric.name == "error"]
    assert decide(STAGES, 0, 100.0, figures(slower=2.0), metrics=errors) == Advance(1)


def test_a_rate_that_falls_is_told_as_it_is():
    rates = [metric for metric in METRICS if metric.name == "tokens_per_s"]
    found = decide(STAGES, 0, 0.0, figures(slower=2.0), metrics=rates)
    assert isinstance(found, RollBack)
    assert found.why.startswith("tokens_per_s -")
