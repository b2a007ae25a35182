from __future__ import annotations

import itertools

import pytest

from mlx_serving import errors
from mlx_serving.types import SamplingParams
from mlx_serving.worker import wire
from mlx_serving.worker.backlog import Backlog
from mlx_serving.worker.client import SequenceStream

LIMIT = 3
_ids = itertools.count(1)


def stream(*, deaths: int = 0, tokens: int = 0) -> SequenceStream:
    sampling = SamplingParams()
    made = SequenceStream(
        wire.Submit(seq_id=next(_ids), model_id="m", token_ids=[1], prompt_len=1, sampling=sampling)
    )
    if tokens:
        made.push(wire.TokenRow(made.request.seq_id, [7] * tokens))
    made.deaths = deaths
    return made


def token(of: SequenceStream) -> None:
    of.push(wire.TokenRow(of.request.seq_id, [8]))


class Worker:
    def __init__(self) -> None:
        self.got: list[SequenceStream] = []

    def send(self, one: SequenceStream) -> bool:
        self.got.append(one)
        return True


@pytest.fixture
async def backlog() -> Backlog:
    return Backlog(lambda _: errors.Overloaded("too late", retry_after_s=1.0), LIMIT)


async def test_suspects_go_one_at_a_time_beside_everybody_else(backlog):
    worker, free, first, second = Worker(), stream(), stream(deaths=1), stream(deaths=1)
    for one in (first, free, second):
        backlog.park(one, 60)
    backlog.hand_over(worker.send)
    assert worker.got == [free, first] and not backlog.holds
    token(first)
    assert worker.got == [free, first, second]


async def test_who_has_not_begun_waits_for_the_last_trial_of_a_suspect(backlog):
    worker, running, fresh = Worker(), stream(tokens=2), stream()
    early, last = stream(deaths=1), stream(deaths=LIMIT - 1)
    for one in (fresh, last, running, early):
        backlog.park(one, 60)
    backlog.hand_over(worker.send)
    assert worker.got == [running, early] and backlog.holds
    late = stream()
    backlog.park(late, 60)
    token(early)
    assert worker.got == [running, early, last] and len(backlog) == 2
    token(last)
    assert worker.got == [running, early, last, fresh, late]
    assert len(backlog) == 0 and not backlog.holds


async def test_another_death_during_the_trial_keeps_who_waits(backlog):
    worker, fresh, last = Worker(), stream(), stream(deaths=LIMIT - 1)
    for one in (fresh, last):
        backlog.park(one, 60)
    backlog.hand_over(worker.send)
    last.starting = True
    backlog.orphaned(worker.got, 60, "it died")
    assert last.ended and not backlog.holds and len(backlog) == 1
    backlog.hand_over(worker.send)
    assert worker.got == [last, fresh]


async def test_a_trial_that_its_client_leaves_is_over(backlog):
    worker, fresh, last = Worker(), stream(), stream(deaths=LIMIT - 1)
    gone = stream()
    for one in (fresh, last, gone):
        backlog.park(one, 60)
    gone.cancel()
    backlog.hand_over(worker.send)
    last.cancel()
    assert worker.got == [last, fresh] and len(backlog) == 0
