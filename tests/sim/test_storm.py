"""Deaths by the thousand, and poisons: nobody else's tokens change, nobody else is given up."""

from __future__ import annotations

import pytest

from sim.storm import Storm


def run(seed: int, **faults: int) -> Storm:
    storm = Storm(seed, **faults)
    try:
        storm.run()  # compares every token with what the request generates alone
    except Exception as error:
        error.add_note(f"Storm({seed}, **{faults})")
        raise
    assert storm.given_up <= storm.poisons
    for seq_id in storm.poisons - storm.given_up:
        request = storm._requests[seq_id]
        assert request.rejected or request.cancelled or request.refused, (
            f"poison {seq_id} was not found"
        )
    return storm


def test_poisons_are_given_up_alone() -> None:
    storms = [run(seed, poisons=1 + seed % 3) for seed in range(40)]
    assert sum(len(storm.given_up) for storm in storms) > 40
    # The first death may be shared, the others are each poison's own.
    assert all(storm.report.deaths >= 2 * len(storm.given_up) for storm in storms)


def test_many_deaths_change_no_token() -> None:
    storms = [run(seed, deaths=20) for seed in range(20)]
    assert sum(storm.report.deaths for storm in storms) >= 400
    assert sum(storm.report.tokens for storm in storms) > 1000


@pytest.mark.slow
def test_fifty_seeds_with_thousands_of_deaths() -> None:
    storms = [run(seed, deaths=100) for seed in range(50)]
    assert sum(storm.report.deaths for storm in storms) >= 5000
    for seed in range(1000, 1300):
        run(seed, poisons=1 + seed % 4)
