"""Steps are short while critical requests keep coming, and no longer."""

from __future__ import annotations

import pytest

from mlx_serving.runtime.core import invariants
from mlx_serving.runtime.core.plan import Limits, Sampled, StepPlan, StepResult
from mlx_serving.runtime.core.scheduler import Scheduler
from mlx_serving.runtime.core.sequence import Sequence
from mlx_serving.runtime.core.vigil import LASTS_S, SHORT_TOKENS
from mlx_serving.types import Priority, SamplingParams

CHUNK = 4 * SHORT_TOKENS


def scheduler(grain: int = 8) -> Scheduler:
    return Scheduler(
        Limits(
            max_num_seqs=4,
            prefill_step_size=CHUNK,
            context_length=4 * CHUNK,
            kv_capacity_tokens=16 * CHUNK,
            prefill_grain=grain,
        )
    )


def add(sched: Scheduler, seq_id: int, length: int, priority: Priority, now_s: float) -> None:
    sched.add(
        Sequence(
            seq_id=seq_id,
            tokens=[*range(length)],
            prompt_len=length,
            sampling=SamplingParams(max_tokens=64, ignore_eos=True),
            priority=priority,
        ),
        now_s,
    )


def step(sched: Scheduler, now_s: float) -> StepPlan:
    plan = sched.schedule(now_s)
    assert plan is not None
    ids = [c.seq_id for c in plan.prefill if c.samples] + [d.seq_id for d in plan.decode]
    sched.apply(StepResult(plan.step_id, [Sampled(i, [5]) for i in ids]))
    invariants.check(sched)
    return plan


def lengths(plan: StepPlan) -> dict[int, int]:
    return {chunk.seq_id: len(chunk.token_ids) for chunk in plan.prefill}


def test_after_a_critical_request_others_prompts_take_less_of_a_step() -> None:
    sched = scheduler()
    add(sched, 1, CHUNK, Priority.CRITICAL, 0.0)
    assert lengths(step(sched, 0.0)) == {1: CHUNK}  # its own is whole
    add(sched, 2, 3 * CHUNK, Priority.NORMAL, 1.0)
    assert lengths(step(sched, 1.0)) == {2: SHORT_TOKENS}
    assert lengths(step(sched, LASTS_S + 0.1)) == {2: CHUNK - SHORT_TOKENS}
    assert lengths(step(sched, LASTS_S + 0.2)) == {2: CHUNK}


def test_each_one_prolongs_it() -> None:
    sched = scheduler()
    for seq_id in (1, 2):
        now_s = seq_id * 0.8 * LASTS_S
        add(sched, seq_id, 1, Priority.CRITICAL, now_s)
        step(sched, now_s)
    add(sched, 3, CHUNK, Priority.LOW, 0.0)
    assert lengths(step(sched, 2.0 * LASTS_S)) == {3: SHORT_TOKENS}


def test_chunks_stay_whole_where_results_would_depend_on_cuts() -> None:
    sched = scheduler(grain=0)
    add(sched, 1, 1, Priority.CRITICAL, 0.0)
    step(sched, 0.0)
    add(sched, 2, 2 * CHUNK, Priority.NORMAL, 1.0)
    assert lengths(step(sched, 1.0)) == {2: CHUNK}


@pytest.mark.parametrize(
    ("present", "urgent", "now_s", "depth"),
    [
        (Priority.NORMAL, Priority.HIGH, 1.0, 2),
        (Priority.NORMAL, Priority.CRITICAL, 1.0, 1),
        (Priority.NORMAL, Priority.CRITICAL, LASTS_S, 2),
        # They would only wait for one another.
        (Priority.CRITICAL, Priority.CRITICAL, 1.0, 2),
    ],
)
def test_one_step_is_in_flight_beside_others(present, urgent, now_s, depth) -> None:
    sched = scheduler()
    add(sched, 1, 1, present, 0.0)
    add(sched, 2, 1, urgent, 0.0)
    step(sched, 0.0)
    assert sched.depth(2, now_s) == depth
