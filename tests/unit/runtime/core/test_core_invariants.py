"""Each invariant notices the fault it is there for."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mlx_serving.runtime.core import invariants
from mlx_serving.runtime.core.plan import Limits
from mlx_serving.runtime.core.scheduler import Scheduler
from mlx_serving.runtime.core.sequence import Sequence, Status
from mlx_serving.types import SamplingParams


def busy() -> Scheduler:
    """Sequence 1 has decoded, 2 is amid its prefill, 3 waits; two steps are in flight."""
    scheduler = Scheduler(Limits(2, 8, 64, 128, 8))
    for seq_id, length in ((1, 3), (2, 20), (3, 3)):
        scheduler.add(
            Sequence(
                seq_id=seq_id,
                tokens=[1] * length,
                prompt_len=length,
                sampling=SamplingParams(max_tokens=1000),
            )
        )
    for _ in range(3):
        assert scheduler.schedule(0.0)
    invariants.check(scheduler)
    return scheduler


def leak_a_row(s: Scheduler) -> None:
    del s.sequences[1]


def forget_a_row(s: Scheduler) -> None:
    s.rows.slots[0] = None


def swap_rows(s: Scheduler) -> None:
    s.rows.slots.reverse()


def run_without_a_row(s: Scheduler) -> None:
    s.sequences[3].status = Status.RUNNING


def lose_from_the_queue(s: Scheduler) -> None:
    s.queue.pop()


def overdraw(s: Scheduler) -> None:
    s.sequences[1].tokens += [1] * 61
    s.sequences[1].computed = 65


def compute_too_much(s: Scheduler) -> None:
    s.sequences[1].computed += 1


def cut_elsewhere(s: Scheduler) -> None:
    s.sequences[2].computed -= 1


def invent_tokens(s: Scheduler) -> None:
    s.sequences[1].inflight += 9


def miscount_the_held(s: Scheduler) -> None:
    s.held += 1


def begin_without_a_grammar(s: Scheduler) -> None:
    s.sequences[1].compiling = True
    s.held += 1


def keep_the_finished(s: Scheduler) -> None:
    s.sequences[3].status = Status.FINISHED


@pytest.mark.parametrize(
    "fault",
    [
        leak_a_row,
        forget_a_row,
        swap_rows,
        run_without_a_row,
        lose_from_the_queue,
        overdraw,
        compute_too_much,
        cut_elsewhere,
        invent_tokens,
        miscount_the_held,
        begin_without_a_grammar,
        keep_the_finished,
    ],
)
def test_a_fault_is_noticed(fault: Callable[[Scheduler], None]) -> None:
    scheduler = busy()
    fault(scheduler)
    with pytest.raises(AssertionError):
        invariants.check(scheduler)
