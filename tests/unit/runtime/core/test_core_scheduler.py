"""The scheduler's promises, one at a time. The simulation has them all at once."""

from __future__ import annotations

import pytest

from mlx_serving.errors import ContextOverflow, DeadlineExceeded, InvalidRequest
from mlx_serving.runtime.core import invariants
from mlx_serving.runtime.core.plan import (
    DecodeRow,
    Limits,
    Matcher,
    PrefillChunk,
    Sampled,
    StepPlan,
    StepResult,
)
from mlx_serving.runtime.core.scheduler import Emitted, Scheduler
from mlx_serving.runtime.core.sequence import Sequence
from mlx_serving.types import Priority, SamplingParams, TokenLogprob, Turn

EOS = 0
TOKEN = 5


def scheduler(
    rows: int = 4, step: int = 8, context: int = 64, capacity: int = 1024, bucket: int = 8
) -> Scheduler:
    return Scheduler(Limits(rows, step, context, capacity, bucket, (EOS,)))


def add(
    sched: Scheduler,
    seq_id: int,
    length: int = 3,
    *,
    generated: int = 0,
    priority: Priority = Priority.NORMAL,
    max_tokens: int = 10_000,
    **sampling: object,
) -> Sequence:
    seq = Sequence(
        seq_id=seq_id,
        tokens=[*range(100, 100 + length), *[TOKEN] * generated],
        prompt_len=length,
        sampling=SamplingParams(max_tokens=max_tokens, **sampling),
        priority=priority,
    )
    sched.add(seq)
    return seq


def plan_of(sched: Scheduler) -> StepPlan:
    plan = sched.schedule(0.0)
    invariants.check(sched)
    assert plan is not None
    return plan


def deliver(
    sched: Scheduler, plan: StepPlan, tokens: dict[int, int] | None = None
) -> list[Emitted]:
    """Answer a plan: TOKEN for every sequence that it samples, but for those named."""
    ids = [c.seq_id for c in plan.prefill if c.samples] + [d.seq_id for d in plan.decode]
    given = tokens or {}
    emitted = sched.apply(
        StepResult(plan.step_id, [Sampled(i, [given.get(i, TOKEN)]) for i in ids])
    )
    invariants.check(sched)
    return emitted


def step(sched: Scheduler, tokens: dict[int, int] | None = None) -> list[Emitted]:
    return deliver(sched, plan_of(sched), tokens)


def test_prompt_then_decode() -> None:
    sched = scheduler()
    add(sched, 1, 3)
    first = plan_of(sched)
    assert [(s.row, s.seq_id, s.token_ids, s.prompt_len) for s in first.starts] == [
        (0, 1, (100, 101, 102), 3)
    ]
    assert first.prefill == (PrefillChunk(0, 1, (100, 101, 102), 0, True),)
    assert deliver(sched, first) == [Emitted(1, [TOKEN])]
    assert plan_of(sched).decode == (DecodeRow(0, 1, 3, TOKEN),)


def test_a_deeper_pipeline_leaves_the_token_on_the_device() -> None:
    sched = scheduler()
    add(sched, 1, 3)
    plans = [plan_of(sched) for _ in range(3)]
    assert [p.decode for p in plans[1:]] == [
        (DecodeRow(0, 1, 3, None),),
        (DecodeRow(0, 1, 4, None),),
    ]
    for plan in plans:
        deliver(sched, plan)
    assert plan_of(sched).decode == (DecodeRow(0, 1, 5, TOKEN),)


def test_a_long_prompt_is_cut_at_multiples_and_decode_runs_beside_it() -> None:
    sched = scheduler(step=8)
    add(sched, 1, 2)
    step(sched)
    add(sched, 2, 19)
    plans = [plan_of(sched) for _ in range(3)]
    assert [(c.start, len(c.token_ids), c.samples) for p in plans for c in p.prefill] == [
        (0, 8, False),
        (8, 8, False),
        (16, 3, True),
    ]
    assert all([d.seq_id for d in p.decode] == [1] for p in plans)


def test_a_prompt_one_over_a_cut_ends_as_a_decode_row() -> None:
    sched = scheduler(step=8)
    add(sched, 1, 9)
    first, second = plan_of(sched), plan_of(sched)
    assert not first.prefill[0].samples and not first.decode
    assert second.decode == (DecodeRow(0, 1, 8, 108),) and not second.prefill


def test_short_prompts_share_a_step_and_a_chunk_that_does_not_fit_is_not_cut() -> None:
    sched = scheduler(step=8)
    for seq_id, length in ((1, 3), (2, 4), (3, 6)):
        add(sched, seq_id, length)
    first, second = plan_of(sched), plan_of(sched)
    assert [c.seq_id for c in first.prefill] == [1, 2]
    assert [(c.seq_id, c.start, len(c.token_ids)) for c in second.prefill] == [(3, 0, 6)]


def test_admission_by_class_then_arrival_and_an_urgent_prompt_goes_first() -> None:
    sched = scheduler(rows=4, step=8)
    add(sched, 1, 30, priority=Priority.LOW)
    plan_of(sched)
    add(sched, 2, 6, priority=Priority.NORMAL)
    add(sched, 3, 8, priority=Priority.CRITICAL)
    order = [[c.seq_id for c in plan_of(sched).prefill] for _ in range(3)]
    assert order == [[3], [2], [1]]


def test_an_urgent_prompt_that_began_later_is_finished_first() -> None:
    sched = scheduler(rows=2, step=8)
    add(sched, 1, 2)
    add(sched, 2, 40, priority=Priority.LOW)
    for _ in range(2):
        step(sched)
    sched.cancel(1)
    add(sched, 3, 24, priority=Priority.CRITICAL)
    assert [[c.seq_id for c in plan_of(sched).prefill] for _ in range(4)] == [[3], [3], [3], [2]]


def test_a_pause_amid_a_prefill_stops_it() -> None:
    sched = scheduler(step=8)
    add(sched, 1, 20)
    plan_of(sched)
    sched.pause(1)
    assert sched.schedule(0.0) is None
    sched.resume(1)
    assert plan_of(sched).prefill[0].start == 8


@pytest.mark.parametrize(
    ("sampling", "token", "reason", "stop_token"),
    [
        ({}, EOS, "stop", EOS),
        ({"stop_token_ids": (9,)}, 9, "stop", 9),
        ({"max_tokens": 1}, TOKEN, "length", None),
        ({"max_tokens": 1}, EOS, "stop", EOS),
    ],
)
def test_what_is_computed_past_the_end_is_discarded(
    sampling: dict[str, object], token: int, reason: str, stop_token: int | None
) -> None:
    sched = scheduler()
    add(sched, 1, **sampling)
    first, second = plan_of(sched), sched.schedule(0.0)
    assert deliver(sched, first, {1: token}) == [Emitted(1, [token], None, reason, stop_token)]
    if second is not None:
        assert deliver(sched, second) == []
    assert plan_of(sched) == StepPlan(step_id=sched.launched[-1][0], frees=(0,))


def test_nothing_is_scheduled_past_max_tokens_or_the_context() -> None:
    sched = scheduler(context=8)
    add(sched, 1, 3, max_tokens=2)
    add(sched, 2, 5)
    plans = []
    while (plan := sched.schedule(0.0)) is not None:
        plans.append(plan)
    sampled = [c.seq_id for p in plans for c in (*p.prefill, *p.decode)]
    assert (sampled.count(1), sampled.count(2)) == (2, 3)
    endings = [e.finish_reason for p in plans for e in deliver(sched, p) if e.finish_reason]
    assert endings == ["length", "length"]


def test_cancel_frees_the_row_and_nothing_more_is_emitted() -> None:
    sched = scheduler()
    for seq_id in (1, 2, 3):
        add(sched, seq_id, 2)
    launched = plan_of(sched)
    assert sched.cancel(1)
    assert not sched.cancel(1)
    invariants.check(sched)
    assert [e.seq_id for e in deliver(sched, launched)] == [2, 3]
    plan = plan_of(sched)
    assert (plan.frees, plan.moves) == ((0,), ((2, 0),))
    assert [(d.row, d.seq_id) for d in plan.decode] == [(0, 3), (1, 2)]


def test_cancel_while_waiting() -> None:
    sched = scheduler(rows=1)
    add(sched, 1)
    add(sched, 2)
    step(sched)
    assert sched.cancel(2) and sched.waiting == 0
    assert sched.cancel(1) and sched.has_work
    assert plan_of(sched).frees == (0,)
    assert not deliver(sched, StepPlan(step_id=1)) and not sched.has_work


def test_resumption_recomputes_and_goes_on_at_the_same_position() -> None:
    sched = scheduler(step=8)
    seq = add(sched, 1, 3, generated=4, max_tokens=6)
    plan = plan_of(sched)
    assert plan.starts[0].prompt_len == 3 and len(plan.prefill[0].token_ids) == 7
    assert deliver(sched, plan)[0].finish_reason is None
    assert step(sched)[0].finish_reason == "length"
    assert len(seq.tokens) == 9


def test_growth_preempts_the_lowest_youngest_and_it_is_recomputed_later() -> None:
    sched = scheduler(rows=4, step=16, capacity=32, bucket=4)
    first = add(sched, 1)
    second = add(sched, 2)
    third = add(sched, 3, priority=Priority.HIGH)
    step(sched)
    while second.row is not None:
        assert first.row is not None and third.row is not None
        step(sched)
    assert first.row is not None and third.row is not None and second.computed == 0
    kept = list(second.tokens)
    assert kept[:3] == [100, 101, 102] and len(kept) > 3
    step(sched)
    assert second.row is None, "admitted back into the memory that was too small for it"
    sched.cancel(1)
    plan = plan_of(sched)
    assert [s.token_ids for s in plan.starts] == [tuple(kept)]
    assert [len(c.token_ids) for c in plan.prefill] == [len(kept)]


def test_tokens_of_a_preempted_sequence_arrive_and_may_end_it() -> None:
    sched = scheduler(rows=2, step=16, capacity=32, bucket=4, context=32)
    add(sched, 1, 6)
    second = add(sched, 2, 6)
    plans = []
    while second.row is not None or not plans:
        plans.append(plan_of(sched))
    assert second.inflight > 0
    got = [e for e in deliver(sched, plans[0], {2: EOS}) if e.seq_id == 2]
    assert [e.finish_reason for e in got] == ["stop"]
    assert sched.waiting == 0
    assert all(e.seq_id == 1 for p in plans[1:] for e in deliver(sched, p))


def test_a_preempted_sequence_waits_for_what_is_in_flight() -> None:
    sched = scheduler(rows=2, step=16, capacity=32, bucket=4, context=32)
    add(sched, 1, 6)
    second = add(sched, 2, 6)
    plans = []
    while second.row is not None or not plans:
        plans.append(plan_of(sched))
    sched.cancel(1)
    plans.append(plan_of(sched))
    assert plans[-1].frees and not plans[-1].starts and sched.schedule(0.0) is None
    for plan in plans:
        deliver(sched, plan)
    assert second.inflight == 0
    assert plan_of(sched).starts[0].token_ids == tuple(second.tokens)


def test_admission_needs_headroom() -> None:
    sched = scheduler(rows=2, capacity=16, bucket=8, context=16)
    add(sched, 1, 3)
    waiting = add(sched, 2, 3)
    step(sched)
    step(sched)
    assert waiting.row is None, "both fit now, and would not a bucket later"


def test_admission_has_no_headroom_to_ask_for_near_the_end() -> None:
    sched = scheduler(rows=2, capacity=16, bucket=8, context=16)
    add(sched, 1, 3, max_tokens=5)
    add(sched, 2, 3, max_tokens=5)
    assert len(plan_of(sched).starts) == 2


def test_a_paused_sequence_computes_nothing_and_keeps_its_row() -> None:
    sched = scheduler()
    seq = add(sched, 1)
    add(sched, 2)
    step(sched)
    sched.pause(1)
    assert [d.seq_id for d in plan_of(sched).decode] == [2]
    assert seq.row == 0
    sched.resume(1)
    assert [d.seq_id for d in plan_of(sched).decode] == [1, 2]


def test_paused_rows_do_not_hold_up_those_who_wait() -> None:
    sched = scheduler(rows=1)
    slow = add(sched, 1)
    step(sched)
    sched.pause(1)
    assert not sched.has_work
    add(sched, 2, max_tokens=1)
    plan = plan_of(sched)
    assert plan.frees == (0,) and [s.seq_id for s in plan.starts] == [2]
    deliver(sched, plan)
    assert sched.schedule(0.0) == StepPlan(step_id=2, frees=(0,))
    assert sched.schedule(0.0) is None
    sched.resume(1)
    assert plan_of(sched).starts[0].token_ids == (100, 101, 102, TOKEN)
    assert slow.row == 0


def test_a_paused_row_gives_way_to_headroom() -> None:
    sched = scheduler(rows=2, capacity=16, bucket=8, context=16)
    add(sched, 1)
    step(sched)
    sched.pause(1)
    add(sched, 2)
    plan = plan_of(sched)
    assert plan.frees == (0,) and [start.seq_id for start in plan.starts] == [2]


def test_rows_freed_after_another_was_given_away_do_not_move_the_start() -> None:
    sched = scheduler(rows=3, step=32, capacity=64, bucket=8)
    for seq_id in (1, 2, 3):
        add(sched, seq_id)
    step(sched)
    sched.pause(1)
    sched.pause(2)
    sched.cancel(3)
    add(sched, 4)
    add(sched, 5, 24)
    plan = plan_of(sched)
    assert (plan.frees, plan.moves) == ((0, 1, 2), ())
    assert [(start.row, start.seq_id) for start in plan.starts] == [(0, 4), (1, 5)]


def test_pause_while_waiting_keeps_it_out() -> None:
    sched = scheduler()
    add(sched, 1)
    sched.pause(1)
    sched.pause(99)
    assert sched.schedule(0.0) is None and sched.waiting == 1
    sched.resume(1)
    sched.resume(99)
    assert [s.seq_id for s in plan_of(sched).starts] == [1]


def test_reset_computes_everything_again() -> None:
    sched = scheduler()
    add(sched, 1)
    add(sched, 2, max_tokens=1)
    step(sched)
    plan_of(sched)
    sched.reset()
    invariants.check(sched)
    assert (sched.running, sched.waiting, sched.steps_in_flight) == (0, 1, 0)
    plan = plan_of(sched)
    assert not plan.frees and plan.starts[0].token_ids == (100, 101, 102, TOKEN)


def test_what_can_never_fit_is_refused_and_told_what_would() -> None:
    sched = scheduler(context=64, capacity=20, bucket=8)
    with pytest.raises(ContextOverflow, match="at most 15 fit"):
        add(sched, 1, 16)
    add(sched, 1, 15)
    with pytest.raises(InvalidRequest) as caught:
        add(sched, 2, 3, generated=2, max_tokens=2)
    assert caught.value.param == "max_tokens"
    assert list(sched.sequences) == [1]


def test_a_big_prompt_is_admitted_though_small_ones_keep_coming() -> None:
    sched = scheduler(rows=4, capacity=64, bucket=8)
    seq_ids = iter(range(1, 1000))
    for _ in range(8):
        add(sched, next(seq_ids), 3, max_tokens=3)
    big = add(sched, 0, 55, max_tokens=5)
    for _ in range(60):
        add(sched, next(seq_ids), 3, max_tokens=3)
        step(sched)
        if 0 not in sched.sequences:
            return
    pytest.fail(f"starves: {big}")


def test_figures() -> None:
    sched = scheduler(rows=1, capacity=100, bucket=8)
    assert not sched.has_work and sched.kv_tokens == 0 and sched.kv_capacity_tokens == 100
    seq = add(sched, 1, 9)
    add(sched, 2)
    assert sched.has_work and (sched.running, sched.waiting) == (0, 2)
    assert sched.schedule(3.5) is not None
    assert seq.admitted_s == 3.5
    assert (sched.running, sched.waiting, sched.kv_tokens, sched.steps_in_flight) == (1, 1, 8, 1)


def test_logprobs_travel_with_their_token() -> None:
    sched = scheduler()
    add(sched, 1, logprobs=0)
    plan = plan_of(sched)
    logprob = TokenLogprob(-0.5)
    emitted = sched.apply(StepResult(plan.step_id, [Sampled(1, [TOKEN], [logprob])]))
    assert emitted == [Emitted(1, [TOKEN], [logprob])]


def test_a_result_out_of_order_is_our_mistake() -> None:
    sched = scheduler()
    add(sched, 1)
    plan_of(sched)
    second = plan_of(sched)
    with pytest.raises(AssertionError):
        deliver(sched, second)


def add_pooled(sched: Scheduler, seq_id: int, length: int) -> None:
    tokens = [*range(100, 100 + length)]
    sampling = SamplingParams(max_tokens=1)
    sched.add(
        Sequence(seq_id=seq_id, tokens=tokens, prompt_len=length, sampling=sampling, pooled=True)
    )


def pool(sched: Scheduler, plan: StepPlan) -> list[Emitted]:
    sampled = [Sampled(c.seq_id, [], vector=b"v") for c in plan.prefill if c.samples]
    emitted = sched.apply(StepResult(plan.step_id, sampled))
    invariants.check(sched)
    return emitted


@pytest.mark.parametrize("length", [1, 7, 8, 9, 17])
def test_a_pooled_sequence_ends_with_its_prompt(length: int) -> None:
    """Its last chunk may be a single token: there is no decode row for it."""
    sched = scheduler(step=8)
    add_pooled(sched, 1, length)
    plans = []
    while (plan := sched.schedule(0.0)) is not None:
        invariants.check(sched)
        plans.append(plan)
    assert not any(plan.decode for plan in plans)
    chunks = [chunk for plan in plans for chunk in plan.prefill]
    assert all(chunk.pooled for chunk in chunks)
    assert sum(len(chunk.token_ids) for chunk in chunks) == length
    assert [chunk.samples for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    emitted = [one for plan in plans for one in pool(sched, plan)]
    assert emitted == [Emitted(1, [], finish_reason="stop", vector=b"v")]
    assert not sched.sequences and plan_of(sched).frees == (0,)


def test_whole_short_texts_fill_a_step_and_the_next_is_not_cut() -> None:
    sched = scheduler(rows=16, step=8)
    for seq_id, length in enumerate((3, 3, 3, 8)):
        add_pooled(sched, seq_id, length)
    plans = [plan_of(sched) for _ in range(3)]
    assert [[c.seq_id for c in plan.prefill] for plan in plans] == [[0, 1], [2], [3]]


def test_a_pooled_sequence_neither_takes_nor_leaves_prefix_blocks() -> None:
    limits = Limits(4, 8, 64, 1024, 8, (EOS,), prefix_blocks=32, prefix_block_tokens=4)
    sched = Scheduler(limits)
    add(sched, 1, 12)
    step(sched)
    step(sched)
    add_pooled(sched, 2, 12)
    plan = plan_of(sched)
    assert plan.starts[0].blocks == () and [c.start for c in plan.prefill] == [0]
    deliver(sched, plan)
    while sched.sequences:
        plan = plan_of(sched)
        assert all(publish.seq_id != 2 for publish in plan.publish)
        ids = [c.seq_id for c in plan.prefill if c.samples]
        sampled = [Sampled(i, [], vector=b"v") for i in ids]
        sampled += [Sampled(row.seq_id, [EOS]) for row in plan.decode]
        sched.apply(StepResult(plan.step_id, sampled))


def test_a_budget_below_the_chunk_gives_a_long_text_a_step_of_its_own() -> None:
    limits = Limits(16, 16, 64, 1024, 8, (EOS,), prefill_budget=6)
    sched = Scheduler(limits)
    for seq_id, length in enumerate((3, 3, 16, 2, 5)):
        add_pooled(sched, seq_id, length)
    plans = [plan_of(sched) for _ in range(4)]
    assert [[c.seq_id for c in plan.prefill] for plan in plans] == [[0, 1], [2], [3], [4]]
    assert plans[1].prefill_tokens == 16


def test_a_critical_sequence_takes_a_low_one_s_row_which_resumes_with_its_tokens() -> None:
    sched = scheduler(rows=2)
    low, high = add(sched, 1, priority=Priority.LOW), add(sched, 2, priority=Priority.HIGH)
    step(sched)
    step(sched)
    add(sched, 3, length=8, priority=Priority.CRITICAL, max_tokens=2)
    plan = plan_of(sched)
    assert [start.seq_id for start in plan.starts] == [3] and low.row is None
    assert high.row is not None and not plan.decode, "beside it nothing else is computed"
    deliver(sched, plan)
    assert [d.seq_id for d in plan_of(sched).decode] == [2, 3]
    sched.launched.clear()
    sched.cancel(3)
    again = sched.schedule(0.0)
    assert again is not None and again.starts[0].seq_id == 1
    assert again.starts[0].token_ids[3:] == (TOKEN, TOKEN)


def test_what_cannot_end_in_time_is_refused_where_others_run() -> None:
    sched = scheduler(rows=2)
    add(sched, 1)
    step(sched)
    sched.step_s = 1.0
    for seq_id, deadline_s in ((2, 2.0), (3, 20.0)):
        seq = Sequence(
            seq_id=seq_id,
            tokens=[1] * 30,
            prompt_len=30,
            sampling=SamplingParams(max_tokens=5),
            turn=Turn(deadline_s=deadline_s),
        )
        sched.add(seq)
    plan = plan_of(sched)
    (refused,) = sched.refused
    assert (refused.seq_id, refused.finish_reason) == (2, "error")
    assert isinstance(refused.error, DeadlineExceeded)
    assert [start.seq_id for start in plan.starts] == [3]


class AnyToken:
    def matcher(self, output: object) -> Matcher:
        raise NotImplementedError


def test_a_sequence_waits_for_its_grammar_without_losing_its_place() -> None:
    sched = scheduler(rows=1)
    early = Sequence(seq_id=1, tokens=[7], prompt_len=1, sampling=SamplingParams(max_tokens=2))
    early.compiling = True
    sched.add(early)
    assert sched.schedule(0.0) is None and not sched.has_work and sched.waiting == 1
    for seq_id in (2, 3):
        add(sched, seq_id, max_tokens=1)
    first = plan_of(sched)
    assert [start.seq_id for start in first.starts] == [2], "nobody waits for a grammar of others"
    constraint = AnyToken()
    sched.provide(1, constraint)
    invariants.check(sched)
    deliver(sched, first)
    second = plan_of(sched)
    assert [(s.seq_id, s.constraint) for s in second.starts] == [(1, constraint)]


def test_a_sequence_may_be_paused_or_end_while_its_grammar_compiles() -> None:
    sched = scheduler()
    for seq_id in (1, 2, 3):
        seq = Sequence(seq_id=seq_id, tokens=[7], prompt_len=1, sampling=SamplingParams())
        seq.compiling = True
        sched.add(seq)
    sched.pause(1)
    sched.resume(1)
    sched.pause(2)
    assert sched.cancel(3)
    assert sched.schedule(0.0) is None and not sched.has_work
    for seq_id in (1, 2, 3):
        sched.provide(seq_id, AnyToken())
        invariants.check(sched)
    assert [start.seq_id for start in plan_of(sched).starts] == [1]
    sched.resume(2)
    assert [start.seq_id for start in plan_of(sched).starts] == [2]
