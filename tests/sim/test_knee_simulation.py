"""The search for the batch's knee on several cost curves, with noise, under a virtual clock: the real
`Ceilings` over a worker whose queue is never empty."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from itertools import pairwise

import pytest

from mlx_serving.config import Config
from mlx_serving.telemetry.metrics import Metrics
from mlx_serving.traffic.ceilings import Ceilings
from mlx_serving.worker.wire import StepStats, Tune
from model_infos import model_info

MOST = 64
TOKENS = 30
"""Of an answer, on average."""
INFO = model_info(max_num_seqs=MOST)

Curve = Callable[[int], float]
"""Milliseconds of a step with so many rows."""


def linear(fixed_ms: float, row_ms: float) -> Curve:
    """Rows always bring something, and ever less."""
    return lambda rows: fixed_ms + row_ms * rows


def roof(flat_ms: float, knee: int) -> Curve:
    """Memory-bound up to the knee and compute-bound beyond it."""
    return lambda rows: flat_ms * max(1.0, rows / knee)


def thrashing(knee: int) -> Curve:
    """Beyond the knee, rows get in each other's way."""
    return lambda rows: 10.0 + 0.2 * rows + 0.3 * max(0, rows - knee) ** 1.5


CURVES: Mapping[str, Curve] = {
    "roof at 4": roof(20.0, 4),
    "roof at 12": roof(20.0, 12),
    "roof at 40": roof(20.0, 40),
    "compute-bound": linear(0.5, 5.0),
    "memory-bound": linear(30.0, 0.05),
    "linear": linear(10.0, 1.0),
    "thrashing at 10": thrashing(10),
    "thrashing at 30": thrashing(30),
}


class Served:
    """A worker that always has more to do than it may."""

    def __init__(self, seed: int, noise: float, **settings: object) -> None:
        self.now_s = 0.0
        self.history: list[tuple[float, int]] = []
        """(second, ceiling)."""
        self._rng, self._noise = random.Random(seed), noise
        self._ceiling, self._rows = MOST, 0
        self._ceilings = Ceilings(
            Config(**settings),
            self,
            Metrics(),
            now=lambda: self.now_s,  # type: ignore[arg-type]
        )
        self._ceilings.loaded(INFO)

    def order(self, tuning: Tune) -> None:
        self._ceiling = tuning.max_num_seqs or MOST

    def run(self, curve: Curve, until_s: float) -> None:
        rng = self._rng
        while self.now_s < until_s:
            ended = sum(rng.random() < 1 / TOKENS for _ in range(self._rows))
            self._rows -= ended
            joined = max(0, min(2, self._ceiling - self._rows))  # two prompts a step
            decoding, self._rows = self._rows, self._rows + joined
            step_ms = curve(decoding) * math.exp(rng.gauss(0, self._noise)) + 4.0 * joined
            if rng.random() < 0.01:
                step_ms *= 5  # something else had the machine
            self.now_s += step_ms / 1e3
            self._ceilings.observe(
                StepStats(
                    "m",
                    decode_rows=decoding,
                    prefill_tokens=20 * joined,
                    running=self._rows,
                    step_ms=step_ms,
                    own_ms=step_ms,
                )
            )
            self.history.append((self.now_s, self._ceiling))

    def usual(self, since_s: float) -> int:
        """The ceiling that it had most of the time since then."""
        spent: dict[int, float] = {}
        for (a_s, rows), (b_s, _) in pairwise(self.history):
            if a_s >= since_s:
                spent[rows] = spent.get(rows, 0.0) + b_s - a_s
        return max(spent, key=lambda rows: spent[rows])

    def changes(self, since_s: float) -> int:
        rows = [n for at_s, n in self.history if at_s >= since_s]
        return sum(a != b for a, b in pairwise(rows))


def near(curve: Curve, rows: int) -> bool:
    """Whether it brings nearly what any number does, and not with many more rows than that takes."""
    best = max(n / curve(n) for n in range(1, MOST + 1))
    least = next(n for n in range(1, MOST + 1) if n / curve(n) >= 0.75 * best)
    return rows / curve(rows) >= 0.75 * best and rows <= 2.3 * least


@pytest.mark.parametrize("usual", [1, 64])
@pytest.mark.parametrize("name", CURVES)
def test_it_comes_near_the_knee_and_stays(name: str, usual: int) -> None:
    served = Served(7, 0.05, find_knee=True, usual_num_seqs=usual)
    served.run(CURVES[name], 300.0)
    assert near(CURVES[name], served.usual(100.0)), served.usual(100.0)
    assert served.changes(150.0) <= 8


def test_it_follows_a_knee_that_moves() -> None:
    served = Served(8, 0.05, find_knee=True)
    for i, knee in enumerate((30, 6, 30)):
        curve = roof(20.0 * knee / 6, knee)
        served.run(curve, 200.0 * (i + 1))
        assert near(curve, served.usual(200.0 * i + 100.0)), (knee, served.usual(200.0 * i + 100.0))


def test_a_service_level_goes_before_throughput() -> None:
    curve = linear(10.0, 1.0)
    served = Served(9, 0.05, find_knee=True, slo=("tpot p95 < 22ms",))
    served.run(curve, 600.0)
    rows = served.usual(100.0)
    assert curve(rows) <= 22.0 and rows >= 5
    assert served.changes(300.0) <= 8


def test_by_hand_or_off_nothing_is_tried() -> None:
    for settings in ({}, {"find_knee": True, "concurrency_limit": 5}):
        served = Served(9, 0.05, **settings)
        served.run(roof(20.0, 4), 30.0)
        assert served.changes(0.0) == 0


def test_noise_alone_moves_nothing_for_long() -> None:
    """Thrice the noise: the ceiling may be off by a trial, and comes back."""
    curve = roof(20.0, 12)
    for seed in range(3):
        served = Served(seed, 0.15, find_knee=True)
        served.run(curve, 300.0)
        assert 8 <= served.usual(100.0) <= 24
