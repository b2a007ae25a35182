from __future__ import annotations

import asyncio
import functools
import os
import signal
import sys

import pytest

from mlx_serving import errors
from mlx_serving.types import SamplingParams
from mlx_serving.worker import port, wire
from mlx_serving.worker.breaker import BreakerPolicy
from mlx_serving.worker.client import HIGH_WATER_TOKENS
from mlx_serving.worker.process import WorkerProcess
from mlx_serving.worker.supervisor import Supervisor
from mlx_serving.worker.wire import ModelOptions, StepStats
from unit.worker.driving import ABORT, FOREVER, RAISE, read, submit, tokens_of, until


async def test_streams_are_whole_and_in_order(worker):
    info = await worker.load_model("m", "any")
    assert info.architecture == "counting"
    got = await asyncio.gather(*(tokens_of(submit(worker, k * 1000, 40)) for k in range(1, 9)))
    assert got == [list(range(k * 1000 + 1, k * 1000 + 41)) for k in range(1, 9)]
    assert isinstance(worker.state, port.Ready)
    assert worker.models == (info,)


async def test_rows_end_with_their_finish_reason(worker):
    await worker.load_model("m", "any")
    rows = [row async for row in submit(worker, max_tokens=3)]
    assert [row.finish_reason for row in rows[:-1]] == [None] * (len(rows) - 1)
    assert rows[-1].finish_reason == "length"


async def test_a_resumed_sequence_continues_after_its_output(worker):
    await worker.load_model("m", "any")
    sampling = SamplingParams(max_tokens=6)
    stream = worker.submit("m", [10, 11, 12, 13], sampling, prompt_len=2)
    assert await tokens_of(stream) == [14, 15, 16, 17]


async def test_two_models_share_a_worker(worker):
    await asyncio.gather(worker.load_model("a", "any"), worker.load_model("b", "any"))
    one, two = submit(worker, 100, 50, "a"), submit(worker, 200, 50, "b")
    assert await asyncio.gather(tokens_of(one), tokens_of(two)) == [
        list(range(101, 151)),
        list(range(201, 251)),
    ]


async def test_concurrent_loads_of_a_model_are_one(worker):
    one, two = await asyncio.gather(worker.load_model("m", "x"), worker.load_model("m", "x"))
    assert one is two


@pytest.mark.parametrize("leave", ["cancel", "break", "context", "task"])
async def test_leaving_a_stream_frees_its_row(worker, leave):
    seen: list[StepStats] = []
    worker.on_stats = seen.append
    await worker.load_model("m", "any", ModelOptions(max_num_seqs=1))
    stream = submit(worker, max_tokens=FOREVER)
    if leave == "cancel":
        async for _ in stream:
            stream.cancel()
            stream.cancel()
    elif leave == "break":
        async for _ in stream:
            break
    elif leave == "context":
        async with stream:
            pass
    else:
        task = asyncio.create_task(tokens_of(stream))
        await until(lambda: seen)
        task.cancel()
        await asyncio.wait([task])
    assert await tokens_of(submit(worker, 5000, 3)) == [5001, 5002, 5003]
    assert stream.ended
    assert all(stats.running <= 1 for stats in seen)


async def test_a_slow_reader_is_set_aside_and_loses_nothing(worker):
    seen: list[StepStats] = []
    worker.on_stats = seen.append
    await worker.load_model("m", "any")
    slow = submit(worker, 0, 20 * HIGH_WATER_TOKENS)
    got = []
    async for row in slow:
        got += row.token_ids
        if len(got) < 4 * HIGH_WATER_TOKENS:
            # Meanwhile a neighbour runs to its end, which alone is more than the slow one may hold.
            quick = await tokens_of(submit(worker, 7000, 3 * HIGH_WATER_TOKENS))
            assert quick == list(range(7001, 7001 + 3 * HIGH_WATER_TOKENS))
            assert len(row.token_ids) < 3 * HIGH_WATER_TOKENS
    assert got == list(range(1, 1 + 20 * HIGH_WATER_TOKENS))


async def test_an_idle_reader_stops_its_sequence(worker):
    seen: list[StepStats] = []
    worker.on_stats = seen.append
    await worker.load_model("m", "any")
    stream = submit(worker, 0, FOREVER)
    await until(lambda: seen)
    await until(lambda: worker.health()[0].phase == "idle")
    # Paused with a row or without: either way it is not computed for.
    assert not stream.ended
    stream.cancel()


async def test_a_failed_step_is_typed_and_the_worker_goes_on(worker):
    await worker.load_model("m", "any")
    pid = worker.health()[0].pid
    with pytest.raises(errors.ServerError, match="this prompt fails") as raised:
        await tokens_of(submit(worker, RAISE))
    assert raised.value.code == "step_failed"
    assert await tokens_of(submit(worker, 10, 2)) == [11, 12]
    assert worker.health()[0].pid == pid


async def test_what_cannot_run_is_refused_in_its_stream(worker):
    await worker.load_model("m", "any")
    with pytest.raises(errors.ModelNotFound, match="'other'"):
        await tokens_of(submit(worker, model="other"))
    long = worker.submit("m", [1] * 100_001, SamplingParams())
    with pytest.raises(errors.ContextOverflow):
        await tokens_of(long)


async def test_a_load_error_is_typed(worker):
    with pytest.raises(errors.ModelBroken, match=r"config\.json is not there"):
        await worker.load_model("m", "broken")
    assert port.ModelLoadFailed("m", "model_unavailable", "config.json is not there") in (
        worker.events
    )
    await worker.load_model("m", "any")


async def test_unloading_ends_its_streams(worker):
    await worker.load_model("m", "any")
    stream = submit(worker, max_tokens=FOREVER)
    await worker.unload_model("m")
    with pytest.raises(errors.ModelNotFound, match="unloaded"):
        await tokens_of(stream)
    assert worker.models == ()


async def test_streams_survive_a_kill(worker):
    await worker.load_model("m", "any")
    wanted = 4 * HIGH_WATER_TOKENS
    streams = [submit(worker, k * 10_000, wanted) for k in range(1, 5)]
    got: list[list[int]] = [[] for _ in streams]
    readers = [asyncio.create_task(read(*pair)) for pair in zip(streams, got, strict=True)]
    for restarts in (1, 2):
        before = got[0].copy()
        await until(lambda before=before: got[0] != before or readers[0].done())
        pid = worker.health()[0].pid
        os.kill(pid, signal.SIGKILL)
        await until(lambda r=restarts: worker.health()[0].restarts == r)
    await asyncio.gather(*readers)
    assert got == [list(range(k * 10_000 + 1, k * 10_000 + 1 + wanted)) for k in range(1, 5)]
    exited = [e for e in worker.events if isinstance(e, port.WorkerExited)]
    assert len(exited) == 2
    assert "SIGKILL" in exited[0].cause and isinstance(exited[0].next, port.Restarting)
    assert worker.health()[0].streams_waiting == 0


async def test_what_was_received_and_not_read_is_neither_lost_nor_doubled(worker):
    """The reader of a paused stream begins only after the worker has died twice."""
    seen: list[StepStats] = []
    worker.on_stats = seen.append
    await worker.load_model("m", "any")
    stream = submit(worker, 0, FOREVER)
    for restarts in (1, 2):
        await until(lambda: len(seen) > 10)
        await until(lambda: worker.health()[0].phase == "idle")
        assert not stream.ended  # it was set aside
        os.kill(worker.health()[0].pid, signal.SIGKILL)
        await until(lambda r=restarts: worker.health()[0].restarts == r)
        await until(lambda: isinstance(worker.state, port.Ready))
    got: list[int] = []
    held = 0
    async for row in stream:
        held = held or len(row.token_ids)
        got += row.token_ids
        if len(got) > held + 4 * HIGH_WATER_TOKENS:
            break
    assert got == list(range(1, 1 + len(got)))


async def test_finished_and_unread_when_the_worker_dies(worker):
    await worker.load_model("m", "any")
    stream = submit(worker, 10, 5)
    await until(lambda: stream.ended)
    os.kill(worker.health()[0].pid, signal.SIGKILL)
    await until(lambda: worker.health()[0].restarts == 1)
    assert await tokens_of(stream) == [11, 12, 13, 14, 15]


async def test_cancelled_while_the_worker_restarts(worker):
    seen: list[StepStats] = []
    worker.on_stats = seen.append
    await worker.load_model("m", "any", ModelOptions(max_num_seqs=1))
    stream = submit(worker, 10, FOREVER)
    rows = aiter(stream)
    read = (await anext(rows)).token_ids  # one or more: rows that nobody has taken are merged
    os.kill(worker.health()[0].pid, signal.SIGKILL)
    await until(lambda: not isinstance(worker.state, port.Ready))
    assert worker.health()[0].streams_waiting == 1
    stream.cancel()
    assert worker.health()[0].streams_waiting == 0
    assert await tokens_of(submit(worker, 20, 2)) == [21, 22]  # the only row is free
    unread = await tokens_of(stream)  # what had arrived before the kill, and nothing of the next
    assert [*read, *unread] == list(range(11, 11 + len(read) + len(unread)))
    assert len(unread) < 100


async def test_a_poison_is_given_up_alone(worker):
    """It begins in one step with everybody else, so that all of them are suspects at first."""
    await worker.load_model("m", "any")
    starts = [1000 * k for k in range(1, 9)]
    readers = [asyncio.create_task(tokens_of(submit(worker, k, 50))) for k in starts]
    with pytest.raises(
        errors.WorkerDied, match=r"(?s)given up: 3 workers.*SIGABRT.*about to abort"
    ):
        await tokens_of(submit(worker, ABORT))
    assert await asyncio.gather(*readers) == [list(range(k + 1, k + 51)) for k in starts]
    assert worker.health()[0].restarts == 3


async def test_a_model_that_kills_its_loads_is_quarantined_and_spares_the_others(worker):
    dying = asyncio.create_task(worker.load_model("m", "die"))
    other = asyncio.create_task(worker.load_model("n", "any"))
    with pytest.raises(errors.ModelBroken, match=r"(?s)quarantined.*status 3.*no memory left"):
        await dying
    await other
    assert worker.health()[0].restarts == 3
    with pytest.raises(errors.ModelBroken, match="quarantined"):
        await worker.load_model("m", "die")
    assert set(worker.health()[0].broken) == {"m"}
    # Put right and asked to forget, it is loaded again.
    worker.restart()
    await worker.load_model("m", "any")
    assert await tokens_of(submit(worker, 1, 2)) == [2, 3]
    assert worker.broken == {}


async def test_a_model_that_kills_its_reloads_is_quarantined(worker, tmp_path):
    await worker.load_model("m", f"once:{tmp_path / 'loaded'}")
    await worker.load_model("n", "any")
    reader = asyncio.create_task(tokens_of(submit(worker, 10, 5000, "n")))
    os.kill(worker.health()[0].pid, signal.SIGKILL)
    await until(lambda: not isinstance(worker.state, port.Ready))
    parked = submit(worker)
    with pytest.raises(errors.ModelBroken, match="status 4"):
        await tokens_of(parked)
    with pytest.raises(errors.ModelBroken, match="status 4"):
        submit(worker)
    assert await reader == list(range(11, 5011))
    assert worker.health()[0].models == ("n",)


async def test_a_crash_loop_opens_the_breaker_and_a_probe_closes_it(spawn, tmp_path):
    """The command fails until it is put right; a stream of the last good worker waits for that."""
    well = tmp_path / "well"
    well.touch()
    bad = (sys.executable, "-c", "print('no such device'); raise SystemExit(7)")
    policy = BreakerPolicy(base_s=0.01, max_deaths=3, open_s=0.3, max_open_s=0.3)
    worker = Supervisor(
        spawn=lambda: spawn() if well.exists() else WorkerProcess(bad), policy=policy
    )
    events = []
    worker.on_event = events.append
    worker.start()
    await worker.load_model("m", "any")
    begun = submit(worker, 20, 5000)
    await until(lambda: begun.begun)
    well.unlink()
    os.kill(worker.health()[0].pid, signal.SIGKILL)
    await until(lambda: isinstance(worker.state, port.CircuitOpen))
    with pytest.raises(errors.Overloaded, match=r"(?s)keeps dying.*status 7.*no such device") as no:
        submit(worker)
    assert no.value.retry_after_s is not None and no.value.retry_after_s >= 1
    with pytest.raises(errors.Overloaded):
        await worker.load_model("n", "any")
    health = worker.health()[0]
    assert (health.state, health.breaker, health.pid) == ("open", "open", None)
    assert health.retry_in_s is not None and "no such device" in (health.cause or "")
    well.touch()
    assert await tokens_of(begun) == list(range(21, 5021))
    assert worker.health()[0].breaker == "closed"
    nexts = [type(e.next) for e in events if isinstance(e, port.WorkerExited)]
    assert nexts[:3] == [port.Restarting, port.Restarting, port.CircuitOpen]
    await worker.stop()


async def test_a_model_whose_every_use_kills_is_found_by_the_probe(spawn):
    """Its load is fine. The half-open breaker asks each model for a token before clients do."""
    policy = BreakerPolicy(base_s=0.01, max_deaths=2, open_s=0.01, max_open_s=0.01)
    worker = Supervisor(spawn=spawn, policy=policy, max_deaths=2)
    worker.start()
    await worker.load_model("m", "deadly")
    await worker.load_model("n", "any")
    reader = asyncio.create_task(tokens_of(submit(worker, 10, 5000, "n")))
    with pytest.raises((errors.ModelBroken, errors.WorkerDied)):
        await tokens_of(submit(worker, 1, 5))
    await until(lambda: "m" in worker.broken)
    with pytest.raises(errors.ModelBroken, match="quarantined"):
        await tokens_of(submit(worker, 1, 5))
    assert await reader == list(range(11, 5011))
    await worker.stop()


async def test_streams_do_not_wait_for_ever(spawn):
    dead: list[int] = []
    policy = BreakerPolicy(base_s=3600)
    worker = Supervisor(
        spawn=lambda: WorkerProcess(("false",)) if dead else spawn(),
        policy=policy,
        resume_timeout_s=0.2,
    )
    worker.start()
    await worker.load_model("m", "any")
    stream = submit(worker, 10, FOREVER)
    rows = aiter(stream)
    await anext(rows)
    dead.append(1)
    os.kill(worker.health()[0].pid, signal.SIGKILL)
    with pytest.raises(errors.WorkerDied, match="no worker took this sequence over"):
        async for _ in rows:
            pass
    await worker.stop()


async def test_restart_replaces_the_worker_under_its_streams(worker):
    await worker.load_model("m", "any")
    starts = [10_000 * k for k in range(1, 5)]
    streams = [submit(worker, k, 3000) for k in starts]
    readers = [asyncio.create_task(tokens_of(stream)) for stream in streams]
    await until(lambda: streams[0].begun)
    first = worker.health()[0].pid
    worker.restart()
    worker.restart()
    late = submit(worker, 5, 3)
    assert await asyncio.gather(*readers) == [list(range(k + 1, k + 3001)) for k in starts]
    assert await tokens_of(late) == [6, 7, 8]
    assert worker.health()[0].pid != first
    assert worker.health()[0].restarts == 1
    (exited,) = [e for e in worker.events if isinstance(e, port.WorkerExited)]
    assert exited.cause.startswith("replaced as asked")
    assert exited.next == port.Restarting(0, 0.0, exited.cause)


async def test_a_tuning_holds_in_every_later_worker_until_it_is_taken_back(worker):
    seen: list[StepStats] = []
    worker.on_stats = seen.append
    worker.order(wire.Tune(model_id="m", max_num_seqs=1))  # before there is such a model
    await worker.load_model("m", "any")

    async def most_rows() -> int:
        seen.clear()
        await asyncio.gather(*(tokens_of(submit(worker, 100 * k, 30)) for k in range(1, 5)))
        return max(stats.running for stats in seen)

    assert await most_rows() == 1
    os.kill(worker.health()[0].pid, signal.SIGKILL)
    await until(lambda: worker.health()[0].restarts == 1)
    assert await most_rows() == 1
    await worker.unload_model("m")
    await worker.load_model("m", "any")
    assert await most_rows() == 1
    worker.order(wire.Tune(model_id="m"))
    for k in range(1, 5):
        submit(worker, 100 * k, FOREVER)  # nobody reads, so that it does not end
    await until(lambda: seen[-1].running == 4)


async def test_a_pin_holds_in_every_later_worker_and_is_answered(worker):
    worker.order(wire.Pin(model_id="m", pinned=True))
    await worker.load_model("m", "any")
    await until(lambda: worker.wired)
    assert worker.wired == {"m": wire.Wired("m", 0, "it has no weights")}
    os.kill(worker.health()[0].pid, signal.SIGKILL)
    await until(lambda: worker.health()[0].restarts == 1 and worker.wired)
    worker.order(wire.Pin(model_id="m"))
    await until(lambda: worker.wired == {"m": wire.Wired("m")})
    await worker.unload_model("m")
    assert worker.wired == {}


async def test_a_model_that_cannot_be_reloaded_says_why_and_spares_the_others(worker, tmp_path):
    await worker.load_model("m", f"breaks:{tmp_path / 'loaded'}")
    await worker.load_model("n", "any")
    os.kill(worker.health()[0].pid, signal.SIGKILL)
    await until(lambda: not isinstance(worker.state, port.Ready))
    parked = submit(worker)
    with pytest.raises(errors.ModelBroken, match="a shard has gone"):
        await tokens_of(parked)
    with pytest.raises(errors.ModelBroken, match="a shard has gone"):
        submit(worker)
    assert await tokens_of(submit(worker, 1, 2, "n")) == [2, 3]
    assert worker.health()[0].models == ("n",)
    # Put right, it can be loaded again.
    await worker.load_model("m", "any")
    assert await tokens_of(submit(worker, 1, 2)) == [2, 3]


async def test_waiting_for_a_worker_is_bounded():
    silent = (sys.executable, "-c", "import time; time.sleep(3600)")
    worker = Supervisor(spawn=functools.partial(WorkerProcess, silent), park_timeout_s=0.05)
    worker.start()
    stream = submit(worker)
    with pytest.raises(errors.Overloaded):
        await tokens_of(stream)
    with pytest.raises(errors.Overloaded):
        await worker.load_model("m", "any")
    await worker.stop(deadline_s=0.05)


async def test_health_says_what_it_is_at(worker):
    assert worker.health()[0].state == "starting"
    load = asyncio.create_task(worker.load_model("m", "hang"))
    await until(lambda: worker.health()[0].phase == "loading")
    health = worker.health()[0]
    assert (health.state, health.models, health.restarts) == ("loading", (), 0)
    assert worker.state == port.Loading(health.pid, ("m",))
    await until(lambda: port.PhaseChanged in map(type, worker.events))
    await worker.stop(deadline_s=0.05)
    with pytest.raises(errors.Draining):
        await load
    assert worker.health()[0].state == "stopped"


async def test_what_nobody_reads_does_not_pile_up_unsent(worker):
    load = asyncio.create_task(worker.load_model("m", "hang"))
    await until(lambda: worker.health()[0].phase == "loading")
    prompt = [1_000_000] * 1_000_000
    sent = 0
    with pytest.raises(errors.Overloaded, match="does not keep up"):
        while sent < 100:
            worker.submit("m", prompt, SamplingParams())
            sent += 1
    assert sent < 20
    await worker.stop(deadline_s=0.05)
    await asyncio.wait([load])
    assert isinstance(load.exception(), errors.Draining)


async def test_a_listener_s_mistake_leaves_nobody_waiting(spawn):
    worker = Supervisor(spawn=spawn)

    def fail(event):
        raise KeyError("of the listener")

    worker.on_event = fail
    worker.start()
    with pytest.raises(errors.Overloaded, match="of the listener"):
        await tokens_of(submit(worker))
    assert isinstance(worker.state, port.Failed)
    await worker.stop()


async def test_it_can_be_started_again(worker):
    await worker.load_model("m", "any")
    await worker.stop()
    worker.start()
    assert await tokens_of(submit(worker, 1, 2)) == [2, 3]
