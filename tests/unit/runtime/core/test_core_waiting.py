"""The waiting queue against a sorted list."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mlx_serving.runtime.core.sequence import Sequence, Status
from mlx_serving.runtime.core.waiting import WaitingQueue
from mlx_serving.types import Priority, SamplingParams


def waiting(arrival: int, priority: Priority = Priority.NORMAL) -> Sequence:
    return Sequence(
        seq_id=arrival,
        tokens=[1],
        prompt_len=1,
        sampling=SamplingParams(),
        arrival=arrival,
        priority=priority,
    )


class QueueMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.queue = WaitingQueue()
        self.members: list[Sequence] = []
        self.arrivals = 0

    @rule(priority=st.sampled_from(list(Priority)), count=st.integers(1, 40))
    def arrive(self, priority: Priority, count: int) -> None:
        for _ in range(count):
            self.members.append(waiting(self.arrivals, priority))
            self.arrivals += 1
            self.queue.push(self.members[-1])

    @rule(index=st.integers(0, 500))
    def cancel(self, index: int) -> None:
        if self.members:
            self.members.pop(index % len(self.members)).status = Status.FINISHED

    @rule(index=st.integers(0, 500))
    def pause_or_resume(self, index: int) -> None:
        if self.members:
            seq = self.members[index % len(self.members)]
            seq.paused = not seq.paused
            if not seq.paused and not seq.queued:
                self.queue.push(seq)

    @rule()
    def admit(self) -> None:
        expected = min((s for s in self.members if not s.paused), key=_order, default=None)
        assert self.queue.peek() is expected
        if expected is not None:
            assert self.queue.pop() is expected and not expected.queued
            expected.status = Status.RUNNING
            self.members.remove(expected)

    @invariant()
    def front_and_bound(self) -> None:
        assert len(self.queue) <= self.queue.bound
        assert all(seq.queued or seq.paused for seq in self.members)


def _order(seq: Sequence) -> tuple[int, int]:
    return seq.order


TestQueue = QueueMachine.TestCase
TestQueue.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_cancelled_entries_are_compacted_away() -> None:
    queue = WaitingQueue()
    for arrival in range(10_000):
        seq = waiting(arrival)
        queue.push(seq)
        seq.status = Status.FINISHED
    assert len(queue) <= 64


def test_compaction_keeps_the_order() -> None:
    queue = WaitingQueue()
    members = [waiting(n, Priority(n * 7 % 4)) for n in range(64)]
    for seq in members:
        queue.push(seq)
    for seq in members[::3]:
        seq.status = Status.FINISHED
    members = [seq for seq in members if seq.status is Status.WAITING] + [waiting(64)]
    queue.push(members[-1])
    assert len(queue) == len(members)
    assert [queue.pop() for _ in members] == sorted(members, key=_order)
