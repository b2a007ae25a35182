from __future__ import annotations

import pytest

from mlx_serving.config import Config
from mlx_serving.telemetry.metrics import Metrics
from mlx_serving.traffic import knee
from mlx_serving.traffic.ceilings import Ceilings, Wishes, tuning
from mlx_serving.traffic.step_guard import WINDOW_STEPS, Bypassed, Degraded, Enabled
from mlx_serving.worker.wire import StepStats, Tune
from model_infos import model_info

INFO = model_info(prefill_step_size=256, max_num_seqs=16)


def tune(rows=None, prefill=None):
    return Tune(model_id="m", max_num_seqs=rows, prefill_tokens=prefill)


@pytest.mark.parametrize(
    ("wishes", "guard", "told"),
    [
        (Wishes(), Enabled(), tune()),
        (Wishes(), Degraded(5, 0, 0), tune(5)),
        (Wishes(), Bypassed(3), tune(3)),
        (Wishes(), Bypassed(99), tune()),
        (Wishes(usual=4), Enabled(), tune(4)),
        (Wishes(usual=99), Enabled(), tune()),
        (Wishes(usual=4), Degraded(6, 0, 0), tune(4)),
        (Wishes(usual=4, ceiling_steps=1), Enabled(), tune(8)),
        (Wishes(usual=4, ceiling_steps=3), Enabled(), tune()),
        (Wishes(usual=4, ceiling_steps=3), Degraded(6, 0, 0), tune(6)),
        (Wishes(ceiling_steps=-1), Enabled(), tune(12)),
        (Wishes(ceiling_steps=-4), Enabled(), tune(4)),
        (Wishes(usual=1, ceiling_steps=-4), Enabled(), tune(1)),
        (Wishes(ceiling_steps=-4), Bypassed(8), tune(8)),
        (Wishes(chunk_halvings=1), Enabled(), tune(None, 128)),
        (Wishes(chunk_halvings=9), Bypassed(2), tune(2, 16)),
    ],
)
def test_who_has_a_say(wishes, guard, told):
    assert tuning(INFO, wishes, guard) == told


class Worker:
    def __init__(self) -> None:
        self.told: list[Tune] = []

    def order(self, tuning: Tune) -> None:
        self.told.append(tuning)


def ceilings(**settings) -> tuple[Ceilings, Worker, Metrics]:
    worker, metrics = Worker(), Metrics()
    made = Ceilings(Config(**settings), worker, metrics, now=lambda: 0.0)
    made.loaded(INFO)
    return made, worker, metrics


def slow(made: Ceilings, rows: int, step_ms: float = 50.0) -> None:
    for _ in range(WINDOW_STEPS):
        made.observe(StepStats("m", decode_rows=rows, running=rows, step_ms=step_ms))


def test_without_a_limit_nothing_is_told_or_reported():
    made, worker, _ = ceilings()
    slow(made, 16)
    assert worker.told == [] and made.report() == []


def test_steps_over_the_limit_lower_the_ceiling():
    made, worker, metrics = ceilings(step_limit_ms=20.0)
    slow(made, 16, step_ms=19.0)
    assert worker.told == []
    slow(made, 16)
    assert worker.told == [tune(12)]
    assert made.report() == [
        {"model": "m", "guard": "degraded", "concurrency": 12, "prefill_tokens": 256}
    ]
    shown = metrics.render().decode()
    assert 'mlx_serving_concurrency_ceiling{model="m"} 12.0' in shown
    assert 'mlx_serving_guard_degraded{model="m"} 1.0' in shown


def test_steps_that_only_prefill_say_nothing():
    made, worker, _ = ceilings(step_limit_ms=20.0)
    for _ in range(WINDOW_STEPS):
        made.observe(StepStats("m", prefill_tokens=256, running=4, step_ms=500.0))
    assert worker.told == []


def test_by_hand_it_is_fixed_and_the_guard_bypassed():
    made, worker, _ = ceilings(step_limit_ms=20.0, concurrency_limit=3)
    assert worker.told == [tune(3)]
    slow(made, 3)
    made.tune(0, -2)
    assert worker.told == [tune(3)]
    assert [row["guard"] for row in made.report()] == ["bypassed"]


def test_settings_change_what_is_told():
    made, worker, _ = ceilings(concurrency_limit=3)
    made.configure(Config(usual_num_seqs=4))
    made.tune(1, 1)
    made.configure(Config())
    made.tune(0, 0)
    assert worker.told == [tune(3), tune(4), tune(8, 128), tune(None, 128), tune()]


def test_what_decodes_nothing_is_left_alone():
    made, worker, _ = ceilings(concurrency_limit=3)
    made.loaded(model_info("e", kind="embedder"))
    assert len(worker.told) == 1


def full(made: Ceilings, rows: int, own_ms: float, steps: int = WINDOW_STEPS) -> None:
    for _ in range(steps):
        made.observe(
            StepStats("m", decode_rows=rows, running=rows, step_ms=9 * own_ms, own_ms=own_ms)
        )


def searching(**settings) -> tuple[Ceilings, Worker, list[float]]:
    """Its clock is the list's only item."""
    worker, now = Worker(), [0.0]
    made = Ceilings(Config(find_knee=True, **settings), worker, Metrics(), now=lambda: now[0])
    made.loaded(INFO)
    return made, worker, now


def test_the_knee_is_looked_for_where_it_is_asked_for():
    made, worker, now = searching(usual_num_seqs=8)
    assert worker.told == [tune(8)]
    assert [row["knee"] for row in made.report()] == ["settled"]
    full(
        made, 8, 20.0, 2 * knee.WINDOW_STEPS
    )  # with other models' steps in between, which do not count
    assert worker.told == [tune(8), tune(12)]
    assert [row["knee"] for row in made.report()] == ["trying"]
    full(made, 8, 99.0, knee.WINDOW_STEPS)  # rows that still fill up
    full(made, 12, 20.0, knee.WINDOW_STEPS)
    assert worker.told[-1] == tune(12)
    assert [row["knee"] for row in made.report()] == ["settled"]
    now[0] += 1000.0
    full(made, 12, 20.0, knee.WINDOW_STEPS)
    full(made, 16, 30.0, knee.WINDOW_STEPS)
    assert worker.told == [tune(8), tune(12), tune(), tune(12)]


@pytest.mark.parametrize(
    "slo", [("tpot p90 < 15ms",), ("tpot p90 < 15ms model=m", "ttft p90 < 1ms")]
)
def test_a_step_longer_than_a_service_level_takes_rows_away(slo):
    made, worker, _ = searching(slo=slo)
    full(made, 16, 20.0, knee.WINDOW_STEPS)
    assert worker.told == [tune(10)]


def test_others_service_levels_do_not_count():
    made, worker, _ = searching(slo=("tpot p90 < 15ms model=other",))
    full(made, 16, 20.0, knee.WINDOW_STEPS)
    assert worker.told == []


def test_while_remedies_have_a_say_nothing_is_tried():
    made, worker, _ = searching()
    made.tune(0, -1)
    full(made, 12, 20.0, 4 * knee.WINDOW_STEPS)
    made.configure(Config(find_knee=True, concurrency_limit=4))
    full(made, 4, 20.0, 4 * knee.WINDOW_STEPS)
    assert worker.told == [tune(12), tune(4)]
    made.configure(Config())
    assert worker.told[-1] == tune(12)
    assert "knee" not in made.report()[0]
