"""Many seeds of the simulation.

A seed that fails is added to KEPT with what it showed, and the fault gets a test of its own in
tests/unit/runtime/core: a change to how scenarios are drawn changes what a seed shows.
"""

from __future__ import annotations

import pytest

from sim.report import Report
from sim.simulation import Simulation

FAST = range(60)
SLOW = range(1_000, 2_000)
KEPT = (
    # A preempted sequence's memory is free again before its tokens have arrived: few get there.
    78,
    379,
    580,
    # A critical one takes the row of a normal one after a low one was admitted in the same plan.
    1605,
)


def run(seed: int) -> Report:
    try:
        return Simulation(seed).run()
    except Exception as error:
        error.add_note(f"make sim SEED={seed}")
        raise


def test_a_few_seeds_and_everything_is_injected() -> None:
    reports = [run(seed) for seed in FAST]
    injected = (
        "preemptions",
        "evictions",
        "discarded",
        "deaths",
        "cancelled",
        "rejected",
        "pressures",
        "compiled",
        "malformed",
    )
    disk = ("disk_read", "disk_written", "disk_lost", "disk_not_written", "disk_evicted")
    turns = ("outranked", "promoted", "refused")
    for what in (
        *injected,
        *disk,
        *turns,
        "disk_late",
        "reused",
        "published",
        "dropped",
        "awaited",
        "foreseen",
        "forced",
    ):
        assert sum(getattr(report, what) for report in reports) > 0, f"no seed shows {what}"
    assert {report.deepest for report in reports} >= {1, 2, 3}


@pytest.mark.parametrize("seed", KEPT)
def test_a_kept_seed(seed: int) -> None:
    run(seed)


@pytest.mark.slow
def test_a_thousand_seeds() -> None:
    for seed in SLOW:
        run(seed)


def test_a_seed_repeats_itself() -> None:
    first: list[str] = []
    second: list[str] = []
    assert Simulation(7, log=first.append).run() == Simulation(7, log=second.append).run()
    assert first == second
