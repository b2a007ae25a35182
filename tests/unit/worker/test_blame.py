from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from mlx_serving.worker.blame import acquit, judge


@dataclass
class Sequence:
    name: str = ""
    starting: bool = False
    deaths: int = 0


@pytest.mark.parametrize(
    ("starting", "deaths", "group", "after"),
    [
        (False, 0, "free", 0),  # it ran, or waited for a row
        (True, 0, "suspects", 1),
        (True, 1, "suspects", 2),
        (True, 2, "guilty", 3),
        (False, 2, "suspects", 2),  # it was not tried again yet: nothing new is known
    ],
)
def test_judge(starting, deaths, group, after):
    one = Sequence("x", starting, deaths)
    verdict = judge([one], 3)
    assert {g: getattr(verdict, g) for g in ("free", "suspects", "guilty") if g == group} == {
        group: [one]
    }
    assert len(verdict.free) + len(verdict.suspects) + len(verdict.guilty) == 1
    assert (one.deaths, one.starting) == (after, False)


def test_whom_least_speaks_against_goes_first():
    a, b, c = Sequence("a", deaths=2), Sequence("b", deaths=1), Sequence("c", deaths=1)
    assert judge([a, b, c], 3).suspects == [b, c, a]


def test_a_token_acquits():
    one = Sequence(starting=True, deaths=2)
    acquit(one)
    assert judge([one], 3).free == [one]


@pytest.mark.parametrize("seed", range(50))
def test_poisons_and_nobody_else_are_given_up(seed):
    """Whoever begins beside a poison, in whatever order and company, goes on."""
    rng = random.Random(seed)
    sequences = [Sequence(f"s{i}") for i in range(rng.randint(1, 20))]
    poisons = rng.sample(sequences, rng.randint(0, min(4, len(sequences))))
    waiting, running, given_up, deaths = sequences[:], [], [], 0
    while waiting:
        verdict = judge(waiting, 3)
        given_up += verdict.guilty
        # The free ones begin in one step; suspects one after the other, if the worker lives.
        batches = [verdict.free, *([s] for s in verdict.suspects)]
        running, waiting = [], []
        for batch in filter(None, batches):
            if waiting:
                waiting += batch
                continue
            for sequence in batch:
                sequence.starting = True
            if any(poison in batch for poison in poisons):
                deaths += 1
                waiting = [*running, *batch]
                running = []
                continue
            for sequence in batch:
                acquit(sequence)
            running += batch
        if waiting:
            waiting += running
    assert sorted(s.name for s in given_up) == sorted(s.name for s in poisons)
    assert deaths <= 3 * len(poisons)
