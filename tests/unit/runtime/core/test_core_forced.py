"""Tokens that are known before they are sampled: what the scheduler does with them."""

from __future__ import annotations

import pytest

from mlx_serving.runtime.core import invariants
from mlx_serving.runtime.core.plan import DecodeRow, Forced, Limits, Sampled, StepPlan, StepResult
from mlx_serving.runtime.core.scheduler import Emitted, Scheduler
from mlx_serving.runtime.core.sequence import Sequence
from mlx_serving.types import SamplingParams

EOS = 0
PROMPT = [100, 101, 102]


def scheduler(max_tokens: int = 50, **sampling: object) -> Scheduler:
    sched = Scheduler(Limits(4, 8, 64, 1024, 8, (EOS,)))
    params = SamplingParams(max_tokens=max_tokens, **sampling)
    sched.add(Sequence(seq_id=1, tokens=list(PROMPT), prompt_len=3, sampling=params))
    return sched


def plan_of(sched: Scheduler) -> StepPlan:
    plan = sched.schedule(0.0)
    invariants.check(sched)
    assert plan is not None
    return plan


def foresee(sched: Scheduler, start: int, *tokens: int) -> list[Emitted]:
    emitted = sched.foresee([Forced(1, start, tokens)])
    invariants.check(sched)
    return emitted


def deliver(sched: Scheduler, plan: StepPlan, token: int) -> list[Emitted]:
    emitted = sched.apply(StepResult(plan.step_id, [Sampled(1, [token])]))
    invariants.check(sched)
    return emitted


def test_a_run_is_one_decode_row_and_its_sample_in_flight_says_nothing() -> None:
    sched = scheduler()
    first = plan_of(sched)
    assert foresee(sched, 3, 7, 8, 9) == [Emitted(1, [7, 8, 9])]
    second = plan_of(sched)
    assert second.decode == (DecodeRow(0, 1, 3, 7, (8, 9)),) and second.forced_tokens == 2
    assert deliver(sched, first, 7) == []
    assert plan_of(sched).decode == (DecodeRow(0, 1, 6, None),)
    assert deliver(sched, second, 5) == [Emitted(1, [5])]


def test_what_is_known_already_is_passed_over() -> None:
    sched = scheduler()
    first, second = plan_of(sched), plan_of(sched)
    assert deliver(sched, first, 6) == [Emitted(1, [6])]
    assert foresee(sched, 3, 6, 7, 8) == [Emitted(1, [7, 8])]
    assert foresee(sched, 3, 6, 7) == [] == foresee(sched, 4, 7, 8)
    assert plan_of(sched).decode == (DecodeRow(0, 1, 4, 7, (8,)),)
    assert deliver(sched, second, 7) == []


def test_two_samples_in_flight_may_be_known_at_once() -> None:
    sched = scheduler()
    first, second = plan_of(sched), plan_of(sched)
    assert foresee(sched, 3, 6, 7, 8) == [Emitted(1, [6, 7, 8])]
    third = plan_of(sched)
    assert third.decode == (DecodeRow(0, 1, 4, 7, (8,)),)
    assert deliver(sched, first, 6) == [] == deliver(sched, second, 7)
    assert deliver(sched, third, 5) == [Emitted(1, [5])]


@pytest.mark.parametrize(
    ("sampling", "reason", "stop"),
    [
        ({"max_tokens": 2}, "length", None),
        ({"stop_token_ids": (8,)}, "stop", 8),
    ],
)
def test_a_run_may_end_its_sequence(sampling: dict, reason: str, stop: int | None) -> None:  # type: ignore[type-arg]
    sched = scheduler(**sampling)
    first = plan_of(sched)
    assert foresee(sched, 3, 7, 8, 9) == [Emitted(1, [7, 8], None, reason, stop)]  # type: ignore[arg-type]
    assert plan_of(sched).frees == (0,)
    assert deliver(sched, first, 7) == [] and not sched.sequences


def test_end_of_sequence_ends_it_unless_it_is_ignored() -> None:
    assert foresee_first(scheduler(), 7, EOS)[0].finish_reason == "stop"
    assert foresee_first(scheduler(ignore_eos=True), 7, EOS)[0].finish_reason is None


def foresee_first(sched: Scheduler, *tokens: int) -> list[Emitted]:
    plan_of(sched)
    return foresee(sched, 3, *tokens)


def test_who_has_left_is_told_nothing() -> None:
    sched = scheduler()
    first = plan_of(sched)
    sched.cancel(1)
    assert foresee(sched, 3, 7, 8) == [] == deliver(sched, first, 7)


def test_a_paused_sequence_keeps_its_run_until_it_goes_on() -> None:
    sched = scheduler()
    plan_of(sched)
    sched.pause(1)
    foresee(sched, 3, 7, 8, 9)
    assert sched.schedule(0.0) is None
    sched.resume(1)
    assert plan_of(sched).decode == (DecodeRow(0, 1, 3, 7, (8, 9)),)


def test_after_a_failed_step_a_run_is_part_of_what_is_computed_again() -> None:
    sched = scheduler()
    plan_of(sched)
    foresee(sched, 3, 7, 8, 9)
    sched.reset()
    plan = plan_of(sched)
    assert plan.starts[0].token_ids == (*PROMPT, 7, 8, 9) == plan.prefill[0].token_ids
    assert deliver(sched, plan, 5) == [Emitted(1, [5])]


def test_a_long_prompt_does_not_hold_a_run_up() -> None:
    sched = scheduler()
    first = plan_of(sched)
    foresee(sched, 3, *range(10, 26))
    params = SamplingParams(max_tokens=5)
    sched.add(Sequence(seq_id=2, tokens=[9] * 40, prompt_len=40, sampling=params))
    plan = plan_of(sched)
    assert plan.decode == (DecodeRow(0, 1, 3, 10, tuple(range(11, 26))),)
    assert len(plan.prefill[0].token_ids) == 8
    assert deliver(sched, first, 10) == []
