from __future__ import annotations

import asyncio
import functools
import os
import threading

import pytest

from mlx_serving import errors
from mlx_serving.types import SamplingParams
from mlx_serving.worker import port
from mlx_serving.worker.inprocess import InProcessWorker, RuntimeThread


@pytest.fixture
async def inprocess(fake):
    worker = InProcessWorker(spawn=functools.partial(RuntimeThread, fake.load))
    worker.start()
    yield worker
    await worker.stop()


def submit(worker, start, max_tokens=8):
    return worker.submit("m", [start], SamplingParams(max_tokens=max_tokens))


async def tokens_of(stream) -> list[int]:
    return [token async for row in stream for token in row.token_ids]


async def test_it_serves_like_a_process(inprocess):
    await inprocess.load_model("m", "any")
    got = await asyncio.gather(*(tokens_of(submit(inprocess, k * 100)) for k in range(1, 5)))
    assert got == [list(range(k * 100 + 1, k * 100 + 9)) for k in range(1, 5)]
    assert inprocess.state == port.Ready(os.getpid())
    assert inprocess.health()[0].state == "ready"


async def test_errors_are_the_same(inprocess, fake):
    with pytest.raises(errors.ModelBroken, match=r"config\.json"):
        await inprocess.load_model("m", "broken")
    await inprocess.load_model("m", "any")
    with pytest.raises(errors.ServerError, match="this prompt fails"):
        await tokens_of(submit(inprocess, fake.RAISE))
    assert await tokens_of(submit(inprocess, 1, 2)) == [2, 3]


async def test_its_thread_ends_with_it(inprocess):
    await inprocess.load_model("m", "any")
    stream = submit(inprocess, 1, 90_000)
    (thread,) = [t for t in threading.enumerate() if t.name == "runtime"]
    await inprocess.stop()
    thread.join(30)
    assert not thread.is_alive()
    with pytest.raises(errors.Draining):
        await tokens_of(stream)


async def test_a_loop_that_fails_is_not_started_again():
    class Mistake(BaseException):
        pass

    def load(*_):
        yield
        raise Mistake("of ours")

    worker = InProcessWorker(spawn=functools.partial(RuntimeThread, load))
    worker.start()
    with pytest.raises(errors.WorkerDied, match="of ours"):
        await worker.load_model("m", "any")
    with pytest.raises(errors.Overloaded, match="of ours"):
        await worker.load_model("m", "any")
    assert isinstance(worker.state, port.Failed)
    await worker.stop()


async def test_a_thread_that_does_not_end_is_left_behind():
    release = threading.Event()

    def load(*_):
        yield
        release.wait(30)
        raise errors.ModelBroken("late")

    worker = InProcessWorker(spawn=functools.partial(RuntimeThread, load))
    worker.start()
    task = asyncio.create_task(worker.load_model("m", "any"))
    while worker.health()[0].phase != "loading":  # noqa: ASYNC110 - a thread's condition
        await asyncio.sleep(0.005)
    await worker.stop(deadline_s=0.01)
    with pytest.raises(errors.Draining):
        await task
    release.set()
