"""What a scheduler takes on at once can change between any two plans."""

from __future__ import annotations

from mlx_serving.runtime.core import invariants
from mlx_serving.runtime.core.plan import Limits, Sampled, StepPlan, StepResult
from mlx_serving.runtime.core.scheduler import Scheduler
from mlx_serving.runtime.core.sequence import Sequence
from mlx_serving.types import Priority, SamplingParams


def scheduler(*, grain: int = 0) -> Scheduler:
    return Scheduler(Limits(4, 8, 64, 1024, 8, (), prefill_grain=grain))


def add(sched: Scheduler, seq_id: int, length: int = 3, priority=Priority.NORMAL) -> Sequence:
    tokens = [*range(100, 100 + length)]
    seq = Sequence(
        seq_id=seq_id,
        tokens=tokens,
        prompt_len=length,
        sampling=SamplingParams(),
        priority=priority,
    )
    sched.add(seq)
    return seq


def step(sched: Scheduler) -> StepPlan:
    plan = sched.schedule(0.0)
    assert plan is not None
    ids = [c.seq_id for c in plan.prefill if c.samples] + [d.seq_id for d in plan.decode]
    sched.apply(StepResult(plan.step_id, [Sampled(i, [5]) for i in ids]))
    invariants.check(sched)
    return plan


def decoded(sched: Scheduler) -> list[int]:
    return [row.seq_id for row in step(sched).decode]


def test_who_runs_goes_on_under_a_lower_ceiling_and_nobody_joins() -> None:
    sched = scheduler()
    for seq_id in (1, 2, 3, 4):
        add(sched, seq_id)
    step(sched), step(sched), step(sched)
    sched.tune(max_num_seqs=2)
    add(sched, 5)
    assert decoded(sched) == [1, 2, 3, 4]
    sched.cancel(1), sched.cancel(2)
    assert sorted(decoded(sched)) == [3, 4] and sched.waiting == 1
    sched.cancel(3)
    step(sched)
    assert sorted(decoded(sched)) == [4, 5]


def test_a_higher_ceiling_lets_those_who_wait_join_at_once() -> None:
    sched = scheduler()
    sched.tune(max_num_seqs=1)
    for seq_id in (1, 2, 3):
        add(sched, seq_id, 2)
    step(sched)
    assert sched.running == 1
    sched.tune()
    step(sched)
    assert sched.running == 3


def test_a_critical_one_takes_one_row_over_where_too_many_still_run() -> None:
    sched = scheduler()
    for seq_id in (1, 2, 3, 4):
        add(sched, seq_id, priority=Priority.LOW)
    step(sched), step(sched), step(sched)
    sched.tune(max_num_seqs=1)
    add(sched, 5, priority=Priority.CRITICAL)
    step(sched)
    assert sched.running == 4, "one row changes hands, and three more are not ended for it"


def chunks(sched: Scheduler) -> list[int]:
    return [len(chunk.token_ids) for chunk in step(sched).prefill]


def test_chunks_end_earlier_where_results_do_not_depend_on_cuts() -> None:
    sched = scheduler(grain=2)
    add(sched, 1, 24)
    assert chunks(sched) == [8]
    sched.tune(prefill_tokens=5)
    assert [chunks(sched) for _ in range(3)] == [[4], [4], [4]]
    sched.tune()
    assert chunks(sched) == [4]  # to the next multiple of 8, as ever


def test_where_they_may_chunks_stay_whole_and_come_one_a_step() -> None:
    sched = scheduler()
    add(sched, 1, 3), add(sched, 2, 4), add(sched, 3, 8)
    sched.tune(prefill_tokens=1)
    assert [chunks(sched) for _ in range(3)] == [[3], [4], [8]]
