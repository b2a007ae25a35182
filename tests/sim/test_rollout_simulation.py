"""Whether rollouts end as they should, over many seeds: false alarms and missed regressions."""

from __future__ import annotations

import msgspec
import pytest

from mlx_serving.telemetry.events import RequestFinished
from mlx_serving.traffic.rollout import Stage
from mlx_serving.traffic.rollouts import measured
from sim.costs import fit, held_out_error, recorded
from sim.rollouts import Ended, simulate

SEEDS = [
    pytest.param(range(10), id="10"),
    *(
        pytest.param(range(i, i + 200), id=f"{i}-{i + 199}", marks=pytest.mark.slow)
        for i in range(0, 1000, 200)
    ),
]


@pytest.fixture(scope="module")
def costs():
    return fit(recorded())


def test_the_cost_model_foretells_requests_that_it_has_not_seen():
    ttft, tpot = held_out_error(recorded())
    assert ttft < 0.6 and tpot < 0.6


@pytest.mark.parametrize("seeds", SEEDS)
def test_a_variant_that_is_no_worse_is_seldom_rolled_back(costs, seeds):
    ended = [simulate(costs, seed, 1.0) for seed in seeds]
    rolled_back = [e for e in ended if e.rolled_back]
    assert len(rolled_back) <= 0.05 * len(seeds)


@pytest.mark.parametrize("seeds", SEEDS)
def test_a_variant_that_is_ten_percent_slower_is_caught_before_it_has_half_the_traffic(
    costs, seeds
):
    ended: list[Ended] = [simulate(costs, seed, 1.1) for seed in seeds]
    caught = [e for e in ended if e.rolled_back and e.stage < 2]
    assert len(caught) >= 0.95 * len(seeds)


@pytest.mark.parametrize(
    "seeds",
    [
        pytest.param(range(3), id="3"),
        pytest.param(range(50), id="50", marks=pytest.mark.slow),
    ],
)
def test_a_queue_that_more_than_half_of_the_traffic_makes_is_not_the_variant_s(costs, seeds):
    """Four rows for each model: at three quarters of the traffic the variant's requests wait for one."""
    stages = [Stage(share) for share in (0.1, 0.25, 0.5, 0.75, 1.0)]
    ended = [simulate(costs, seed, 1.0, stages=stages, rows=4) for seed in seeds]
    assert len([e for e in ended if e.rolled_back]) <= 0.05 * len(seeds)


def test_compared_as_they_come_the_smaller_share_looks_slower(costs):
    """What the strata of company, and leaving out other models' steps, are for."""

    def as_they_come(finished: RequestFinished):
        return measured(msgspec.structs.replace(finished, company=None))

    ended = [simulate(costs, seed, 1.0, measure=as_they_come) for seed in range(5)]
    assert all(e.rolled_back for e in ended)
