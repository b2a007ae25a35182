from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from mlx_serving.telemetry.events import RequestFinished
from mlx_serving.traffic.regression import BLOCK, LEARN, Drift, Drifts
from mlx_serving.types import Usage

ENOUGH = BLOCK * LEARN


class Clock:
    def __init__(self) -> None:
        self.now_s = 1e9

    def __call__(self) -> float:
        return self.now_s


class Traffic:
    """Requests of a model whose latencies scatter by half; `slower` and `hits` change them."""

    def __init__(self, file: Path | None = None, seed: int = 1, settings: str = "s") -> None:
        self.clock = Clock()
        self.told: list[Drift] = []
        self.drifts = Drifts(file, settings, self.told.append, self.clock)
        self._rng = random.Random(seed)

    def send(self, count: int, *, slower: float = 1.0, hits: float = 0.7, **fields) -> None:
        for _ in range(count):
            self.clock.now_s += 1.0
            cached = 100 if self._rng.random() < hits else 0
            self.drifts.observe(
                RequestFinished(
                    **{
                        "request_id": "r",
                        "model_id": "m",
                        "outcome": "stop",
                        "usage": Usage(
                            prompt_tokens=100, completion_tokens=9, cached_tokens=cached
                        ),
                        "ttft_ms": self._rng.lognormvariate(4, 0.5) * slower,
                        "tpot_ms": self._rng.lognormvariate(2, 0.5) * slower,
                        "duration_ms": 500.0,
                        **fields,
                    }
                )
            )


def test_a_drift_is_found_and_named():
    traffic = Traffic()
    traffic.send(ENOUGH)
    traffic.drifts.mark("a start")
    traffic.send(200)
    traffic.clock.now_s += 1
    traffic.drifts.mark("a config reload")
    changed_s = traffic.clock.now_s
    traffic.send(400, hits=0.03)
    (drift,) = traffic.told
    assert drift.metric == "prefix_hits" and drift.after == "a config reload"
    assert drift.before == pytest.approx(0.7, abs=0.05) and drift.now == pytest.approx(
        0.03, abs=0.1
    )
    assert abs(drift.since_s - changed_s) <= 2 * BLOCK
    said = r"m: prefix hits fell from \d+ % to \d+ % since \d{4}-\d\d-\d\d \d\d:\d\d, after a config reload"
    assert re.fullmatch(said, drift.line)
    assert list(traffic.drifts.found) == [drift]


def test_latencies_that_rise_by_a_third_are_found():
    traffic = Traffic()
    traffic.send(ENOUGH)
    traffic.send(1000, slower=1.33)
    assert {drift.metric for drift in traffic.told} == {"ttft", "tpot"}


def test_what_gets_better_is_no_drift():
    traffic = Traffic()
    traffic.send(ENOUGH)
    traffic.send(2000, slower=0.5, hits=1.0)
    assert traffic.told == []


@pytest.mark.parametrize("seeds", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_false_alarms_are_rare(seeds):
    """20,000 requests like those that were learnt from: an alarm in at most a tenth of the seeds."""
    alarms = 0
    for seed in range(seeds):
        traffic = Traffic(seed=seed)
        traffic.send(ENOUGH)
        traffic.send(20_000 if seeds == 100 else 5_000)
        alarms += bool(traffic.told)
    assert alarms <= 0.1 * seeds


def test_an_alarm_is_raised_once_until_it_is_over():
    traffic = Traffic()
    traffic.send(ENOUGH)
    traffic.send(1000, hits=0.0)
    traffic.send(2000)
    traffic.send(1000, hits=0.0)
    assert [drift.metric for drift in traffic.told] == ["prefix_hits"] * 2


def test_baselines_outlive_a_restart_and_belong_to_their_settings(tmp_path):
    file = tmp_path / "baselines.json"
    Traffic(file).send(ENOUGH)
    again = Traffic(file, seed=2)
    again.send(300, slower=2.0)
    assert again.told
    other = Traffic(file, seed=2, settings="others")
    other.send(300, slower=2.0)
    assert other.told == []  # it is learning


def test_an_unreadable_file_costs_the_baselines_only(tmp_path):
    (tmp_path / "b.json").write_text("{")
    traffic = Traffic(tmp_path / "b.json")
    traffic.send(ENOUGH)
    assert "|ttft|" in (tmp_path / "b.json").read_text()


def test_what_says_nothing_is_left_out():
    traffic = Traffic()
    traffic.send(ENOUGH)
    traffic.send(500, slower=9.0, reused="hit")
    traffic.send(500, slower=9.0, outcome="worker_died")
    assert traffic.told == []
