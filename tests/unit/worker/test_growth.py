from __future__ import annotations

import asyncio

import pytest

from mlx_serving import errors
from mlx_serving.types import SamplingParams
from mlx_serving.worker import port
from mlx_serving.worker.growth import MOST_AGE_S, Growth
from mlx_serving.worker.supervisor import Supervisor
from mlx_serving.worker.watchdog import Deadlines

HANG = 903  # as fake_worker.py has it


async def tokens_of(worker, start, count) -> list[int]:
    sampling = SamplingParams(max_tokens=count, ignore_eos=True)
    return [t async for row in worker.submit("m", [start], sampling) for t in row.token_ids]


def test_a_worker_is_replaced_above_the_limit_and_not_before_its_time():
    growth = Growth(100, least_age_s=60)
    assert not growth.outgrown(100, 1000)
    assert not growth.outgrown(101, 59)
    assert growth.outgrown(101, 60)
    assert not Growth(0).outgrown(1 << 60, 1e9)
    assert not growth.outgrown(0, 1000)  # it has not told


def test_a_limit_below_what_is_needed_does_not_have_it_replaced_over_and_over():
    growth = Growth(100, least_age_s=60)
    ages = []
    for _ in range(8):
        ages.append(growth.least_age_s)
        growth.replaced(growth.least_age_s)
    assert ages == [60, 120, 240, 480, 960, 1920, MOST_AGE_S, MOST_AGE_S]
    growth.replaced(3 * MOST_AGE_S)
    assert growth.least_age_s == 60


async def test_a_worker_that_has_outgrown_its_limit_is_replaced_and_streams_go_on(spawn):
    events = []
    growth = Growth(limit_bytes=1, least_age_s=0.0)
    worker = Supervisor(spawn=spawn, growth=growth)
    worker.on_event = events.append
    worker.start()
    await worker.load_model("m", "any")
    starts = [100_000 * k for k in range(1, 5)]
    readers = [asyncio.create_task(tokens_of(worker, k, 20_000)) for k in starts]
    while worker.health()[0].restarts < 2:  # noqa: ASYNC110 - the condition is another process's
        await asyncio.sleep(0.01)
    worker.bound(Deadlines(), 300.0, 0)
    assert await asyncio.gather(*readers) == [list(range(k + 1, k + 20_001)) for k in starts]
    causes = [e.cause for e in events if isinstance(e, port.WorkerExited)]
    assert all("more than worker_rss_limit_bytes" in cause for cause in causes)
    assert worker.health()[0].breaker == "closed"
    await worker.stop()


async def test_deadlines_that_are_set_later_hold(spawn):
    worker = Supervisor(spawn=spawn, max_deaths=1)
    worker.start()
    await worker.load_model("m", "any")
    reader = asyncio.create_task(tokens_of(worker, HANG, 8))
    worker.bound(Deadlines(step_s=1.0), 300.0, 0)
    with pytest.raises(errors.WorkerDied, match="a step took longer than 1 s"):
        await reader
    await worker.stop()
