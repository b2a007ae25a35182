"""Who goes first among clients, and who has waited too long."""

from __future__ import annotations

import math

import pytest

from mlx_serving.runtime.core.plan import Limits
from mlx_serving.runtime.core.policy import rank, stands_aside, too_late, yields
from mlx_serving.runtime.core.sequence import Sequence, Status
from mlx_serving.runtime.core.shares import Shares
from mlx_serving.runtime.core.waiting import WaitingQueue
from mlx_serving.types import Priority, SamplingParams, Turn

FIVE = SamplingParams(max_tokens=5)
LIMITS = Limits(16, 8, 64, 1024, 8, max_wait_s=10.0)


def sequence(
    arrival: int = 0,
    priority: Priority = Priority.NORMAL,
    *,
    at_s: float = 0.0,
    prompt: int = 20,
    row: int | None = None,
    sampling: SamplingParams = FIVE,
    **turn: object,
) -> Sequence:
    seq = Sequence(
        seq_id=arrival,
        tokens=[1] * prompt,
        prompt_len=prompt,
        sampling=sampling,
        arrival=arrival,
        priority=priority,
        turn=Turn(**turn),
    )
    seq.arrived_s, seq.row = at_s, row
    return seq


def compute(shares: Shares, seq: Sequence, tokens: int) -> None:
    seq.computed += tokens
    shares.charge(seq)


def test_tokens_are_charged_once_and_by_weight() -> None:
    shares, seq = Shares(), sequence(client="a", weight=2.0)
    shares.enter("a")
    compute(shares, seq, 10)
    assert shares.served("a") == 5.0
    seq.computed = 4  # preempted, and on its way again
    shares.charge(seq)
    compute(shares, seq, 8)
    assert shares.served("a") == 6.0
    copied = sequence(client="a", weight=2.0)
    copied.computed = copied.reused = 16
    compute(shares, copied, 2)
    assert shares.served("a") == 7.0


def test_who_comes_anew_starts_level_and_leaving_forgives_nothing() -> None:
    shares = Shares()
    shares.enter("a")
    compute(shares, sequence(client="a"), 10)
    shares.enter("b")
    assert shares.served("b") == 10.0
    compute(shares, sequence(client="b"), 90)
    shares.leave("b")
    shares.enter("b")
    assert shares.served("b") == 100.0
    shares.leave("a")
    shares.leave("b")
    shares.enter("b")
    assert shares.served("b") == 0.0, "with nobody there all begins anew"


def test_the_client_served_least_goes_first_in_each_class() -> None:
    shares = Shares()
    queue = WaitingQueue(shares)
    sequences = [sequence(i, client="ab"[i % 2]) for i in range(4)]
    urgent = sequence(9, Priority.CRITICAL, client="a")
    for seq in (*sequences, urgent):
        shares.enter(seq.turn.client)
        queue.push(seq)
    compute(shares, sequence(client="a"), 50)
    assert queue.pop() is urgent
    assert [queue.pop().seq_id for _ in range(2)] == [1, 3]
    shares.enter("b")
    queue.push(sequence(10, client="b"))
    compute(shares, sequence(client="b"), 60)
    assert [queue.pop().seq_id for _ in range(3)] == [0, 2, 10]


def test_the_lane_has_the_oldest_first_and_so_many_rows() -> None:
    queue = WaitingQueue(max_wait_s=10.0, lane_rows=1)
    old, older = sequence(1, Priority.LOW, at_s=1.0), sequence(2, Priority.NORMAL, at_s=0.5)
    urgent = sequence(3, Priority.CRITICAL, at_s=9.0)
    for seq in (old, older, urgent):
        queue.push(seq)
    queue.advance(10.0, [])
    assert queue.peek() is urgent
    queue.advance(11.0, [])
    assert old.promoted and older.promoted and not urgent.promoted
    assert queue.pop() is older
    assert queue.peek() is urgent, "its one row is taken"
    queue.advance(12.0, [older])
    assert queue.pop() is urgent and queue.pop() is old, "before nobody"
    assert queue.peek() is None and len(queue) == 0


def test_how_long_one_waits_may_change() -> None:
    queue = WaitingQueue(lane_rows=2)
    old, urgent = sequence(1, Priority.LOW, at_s=1.0), sequence(2, Priority.CRITICAL, at_s=9.0)
    queue.push(old)
    queue.push(urgent)
    queue.advance(1000.0, [])
    assert not old.promoted
    queue.take_turns(10.0)
    queue.advance(11.0, [])
    assert old.promoted and queue.peek() is old
    queue.take_turns(math.inf)
    queue.advance(1000.0, [])
    assert not urgent.promoted
    assert queue.pop() is old, "who is in the lane stays"
    assert queue.pop() is urgent and queue.peek() is None and len(queue) == 0


def test_the_lane_forgets_those_who_left() -> None:
    queue = WaitingQueue(max_wait_s=10.0)
    gone, paused, stays = (sequence(i) for i in range(3))
    for seq in (gone, paused, stays):
        queue.push(seq)
    gone.status, paused.paused = Status.FINISHED, True
    queue.advance(20.0, [])
    assert queue.pop() is stays and queue.peek() is None
    assert paused.promoted and not paused.queued
    paused.paused = False
    queue.push(paused)
    assert queue.pop() is paused


@pytest.mark.parametrize(
    ("running", "waiting", "gives_way"),
    [
        (sequence(priority=Priority.LOW, row=0), Priority.CRITICAL, True),
        (sequence(priority=Priority.NORMAL, row=0), Priority.CRITICAL, True),
        (sequence(priority=Priority.HIGH, row=0), Priority.CRITICAL, False),
        (sequence(priority=Priority.LOW, row=0), Priority.HIGH, True),
        (sequence(priority=Priority.LOW, row=0), Priority.NORMAL, False),
        (sequence(priority=Priority.LOW, row=None), Priority.CRITICAL, False),
    ],
)
def test_who_gives_a_row_up(running, waiting, gives_way) -> None:
    assert yields(running, sequence(5, waiting)) is gives_way
    running.promoted = True
    assert not yields(running, sequence(5, waiting))
    running.paused = True
    assert yields(running, sequence(5, waiting)) is (running.row is not None)


@pytest.mark.parametrize(
    ("priority", "urgent", "now_s", "aside"),
    [
        (Priority.HIGH, Priority.CRITICAL, 1.0, True),
        (Priority.LOW, Priority.CRITICAL, 1.0, True),
        (Priority.CRITICAL, Priority.CRITICAL, 1.0, False),
        (Priority.LOW, Priority.HIGH, 1.0, False),
        (Priority.LOW, Priority.CRITICAL, 10.0, False),
    ],
)
def test_who_stands_aside(priority, urgent, now_s, aside) -> None:
    seq = sequence(priority=priority)
    assert stands_aside(seq, urgent, now_s, LIMITS) is aside
    seq.promoted = True
    assert not stands_aside(seq, urgent, now_s, LIMITS)


@pytest.mark.parametrize(
    ("expected", "short_first", "later_s"),
    [(None, False, 0), (100, False, 0), (None, True, 10), (100, True, 1), (10**6, True, 10)],
)
def test_a_long_job_ranks_as_if_it_came_later(expected, short_first, later_s) -> None:
    limits = Limits(16, 8, 64, 1024, 8, short_jobs_first=short_first)
    assert rank(sequence(at_s=3.0, expected_tokens=expected), limits) == 3.0 + later_s


@pytest.mark.parametrize(
    ("deadline_s", "now_s", "step_s", "late"),
    [
        (None, 1e9, 1.0, False),
        (5.0, 5.1, 0.0, True),
        (5.0, 4.9, 0.0, False),
        # Three chunks, the last of which gives the first token.
        (5.0, 2.0, 1.0, False),
        (5.0, 2.1, 1.0, True),
    ],
)
def test_whether_it_can_end_in_time(deadline_s, now_s, step_s, late) -> None:
    assert too_late(sequence(deadline_s=deadline_s), 0, now_s, step_s, LIMITS) is late


def test_what_it_generates_at_least_and_what_is_copied_count() -> None:
    hurried = sequence(deadline_s=10.0, sampling=SamplingParams(max_tokens=50, min_tokens=9))
    assert too_late(hurried, 0, 0.0, 1.0, LIMITS) and not too_late(hurried, 8, 0.0, 1.0, LIMITS)
    endless = sequence(deadline_s=10.0, sampling=SamplingParams(max_tokens=50, ignore_eos=True))
    assert too_late(endless, 0, 0.0, 0.2, LIMITS)
    begun = sequence(deadline_s=10.0)
    begun.admitted_s = 1.0
    resumed = sequence(deadline_s=10.0)
    resumed.tokens.append(7)
    assert not too_late(begun, 0, math.inf, 1.0, LIMITS)
    assert not too_late(resumed, 0, math.inf, 1.0, LIMITS)
