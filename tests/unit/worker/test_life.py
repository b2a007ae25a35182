from __future__ import annotations

import asyncio
import functools
import os
import signal

import pytest

from mlx_serving import clock, errors
from mlx_serving.worker import port, wire
from mlx_serving.worker.breaker import BreakerPolicy
from mlx_serving.worker.life import Life
from mlx_serving.worker.process import WorkerProcess
from mlx_serving.worker.supervisor import Supervisor
from mlx_serving.worker.watchdog import Deadlines
from mlx_serving.worker.wire import ModelOptions
from unit.worker.driving import FOREVER, HANG, alive, submit, tokens_of, until


async def test_a_process_that_cannot_be_spoken_to_is_not_left_behind(spawn):
    process = spawn()
    process.socket.close()
    with pytest.raises(OSError):
        await Life.begin(lambda: process, port.ignore, port.ignore, clock.monotonic)
    assert not alive(process.pid)


async def test_a_step_that_hangs_is_ended_and_given_up_alone(spawn):
    worker = Supervisor(spawn=spawn, deadlines=Deadlines(step_s=1.0), max_deaths=1)
    events = []
    worker.on_event = events.append
    worker.start()
    await worker.load_model("m", "any")
    stream = submit(worker, 10, 5000)
    reader = asyncio.create_task(tokens_of(stream))
    await until(lambda: stream.begun)
    with pytest.raises(errors.WorkerDied, match="a step took longer than 1 s"):
        await tokens_of(submit(worker, HANG))
    exited = next(e for e in events if isinstance(e, port.WorkerExited))
    assert "in misbehave" in exited.cause  # it was asked where it is
    assert await reader == list(range(11, 5011))
    await worker.stop()


async def test_a_stopped_process_is_replaced(spawn):
    """A slow machine may have it replaced once more, which nobody notices either."""
    worker = Supervisor(spawn=spawn, deadlines=Deadlines(silence_s=2.5))
    worker.start()
    await worker.load_model("m", "any")
    pid = worker.health()[0].pid
    stream = submit(worker, 10, 5000)
    reader = asyncio.create_task(tokens_of(stream))
    await until(lambda: stream.begun)
    os.kill(pid, signal.SIGSTOP)
    assert await reader == list(range(11, 5011))
    assert not alive(pid)
    assert worker.health()[0].restarts >= 1
    await worker.stop()


async def test_restart_ends_a_worker_that_does_not_heed_it(spawn):
    worker = Supervisor(spawn=spawn, replace_timeout_s=0.1)
    worker.start()
    await worker.load_model("m", "any")
    stream = submit(worker, 10, 5000)
    reader = asyncio.create_task(tokens_of(stream))
    await until(lambda: stream.begun)
    os.kill(worker.health()[0].pid, signal.SIGSTOP)
    worker.restart()
    assert await reader == list(range(11, 5011))
    await worker.stop()


async def test_a_load_that_hangs_is_ended(spawn):
    worker = Supervisor(spawn=spawn, deadlines=Deadlines(load_s=0.5))
    worker.start()
    with pytest.raises(errors.ModelBroken, match="took longer"):
        await worker.load_model("m", "hang")
    await worker.load_model("n", "any")
    assert worker.health()[0].restarts == 1
    await worker.stop()


async def test_a_command_that_cannot_start_fails_with_its_reason():
    spawn = functools.partial(WorkerProcess, ("/nonexistent/python",))
    worker = Supervisor(spawn=spawn, policy=BreakerPolicy(max_deaths=2, base_s=0))
    worker.start()
    with pytest.raises(errors.Overloaded, match="could not be started"):
        await worker.load_model("m", "any")
    await worker.stop()


@pytest.mark.parametrize("when", ["starting", "ready", "hung"])
async def test_stop_leaves_no_process(spawn, when):
    worker = Supervisor(spawn=spawn)
    worker.start()
    streams = []
    if when == "starting":
        streams.append(submit(worker))
        await until(lambda: worker.health()[0].pid is not None)
    else:
        await worker.load_model("m", "any")
        streams.append(submit(worker, HANG if when == "hung" else 1, FOREVER))
    pid = worker.health()[0].pid
    assert alive(pid)
    await worker.stop(deadline_s=5.0 if when == "ready" else 0.1)
    assert not alive(pid)
    for stream in streams:
        with pytest.raises(errors.Draining):
            await tokens_of(stream)
    with pytest.raises(errors.Draining):
        submit(worker)
    assert worker.health()[0].state == "stopped"


async def test_interrupts_to_the_worker_and_its_group_are_ignored(worker):
    await worker.load_model("m", "any")
    pid = worker.health()[0].pid
    assert os.getsid(pid) == pid != os.getsid(0)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.killpg(pid, number)
    assert await tokens_of(submit(worker, 1, 100)) == list(range(2, 102))
    assert worker.health()[0].pid == pid


async def test_the_worker_leaves_when_the_parent_goes(spawn):
    for load in ("any", "hang"):
        process = spawn()
        await asyncio.to_thread(process.socket.recv, 4)  # it lives
        process.socket.sendall(wire.encode(wire.LoadModel("m", load, ModelOptions())))
        process.socket.close()
        async with asyncio.timeout(120):
            assert await process.exited == 0
