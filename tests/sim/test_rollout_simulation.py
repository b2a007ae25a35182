"""Whether rollouts end as they should, over many seeds: false alarms and missed regressions."""

from __future__ import annotations

import pytest

from sim.costs import fit, held_out_error, recorded
from sim.rollouts import Ended, simulate

SEEDS = [
    pytest.param(20, id="20"),
    pytest.param(1000, id="1000", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def costs():
    return fit(recorded())


def test_the_cost_model_foretells_requests_that_it_has_not_seen():
    ttft, tpot = held_out_error(recorded())
    assert ttft < 0.6 and tpot < 0.6


@pytest.mark.parametrize("seeds", SEEDS)
def test_a_variant_that_is_no_worse_is_seldom_rolled_back(costs, seeds):
    ended = [simulate(costs, seed, 1.0) for seed in range(seeds)]
    rolled_back = [e for e in ended if e.rolled_back]
    assert len(rolled_back) <= 0.05 * seeds


@pytest.mark.parametrize("seeds", SEEDS)
def test_a_variant_that_is_ten_percent_slower_is_caught_before_it_has_half_the_traffic(
    costs, seeds
):
    ended: list[Ended] = [simulate(costs, seed, 1.1) for seed in range(seeds)]
    caught = [e for e in ended if e.rolled_back and e.stage < 2]
    assert len(caught) >= 0.95 * seeds
