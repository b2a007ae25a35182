from __future__ import annotations

import asyncio
import socket

import pytest

from mlx_serving import errors
from mlx_serving.types import SamplingParams, TokenLogprob
from mlx_serving.worker import wire
from mlx_serving.worker.client import HIGH_WATER_TOKENS, Connection, SequenceStream

STATS = wire.StepStats("m", decode_rows=1)


class Worker:
    """The other end of a connection, in the test's hands."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._splitter = wire.FrameSplitter()

    async def send(self, *rows: wire.TokenRow) -> None:
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self._sock, wire.encode(wire.Step(list(rows), STATS)))

    def say(self, *messages: wire.FromWorker) -> None:
        for message in messages:
            self._sock.send(wire.encode(message))

    async def receive(self) -> list[wire.ToWorker]:
        loop = asyncio.get_running_loop()
        data = await loop.sock_recv(self._sock, 65536)
        return [wire.decode_to_worker(body) for body in self._splitter.feed(data)]

    def close(self) -> None:
        self._sock.close()


@pytest.fixture
async def ends():
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    seen: list[wire.StepStats] = []
    connection = await Connection.open(ours, seen.append, lambda _: None)
    connection.seen = seen
    yield connection, Worker(theirs)
    connection.close()
    theirs.close()


def open_stream(connection, seq_id=1) -> SequenceStream:
    stream = SequenceStream(
        wire.Submit(
            seq_id=seq_id, model_id="m", token_ids=[1], prompt_len=1, sampling=SamplingParams()
        )
    )
    connection.submit(stream)
    return stream


async def steps(connection, count: int) -> None:
    while len(connection.seen) < count:  # noqa: ASYNC110 - the socket's pace
        await asyncio.sleep(0.001)


async def test_rows_left_lying_become_one(ends):
    connection, worker = ends
    stream = open_stream(connection)
    first, second = TokenLogprob(-1.0), TokenLogprob(-2.0)
    await worker.send(wire.TokenRow(1, [5], [first], cached_tokens=3, cache_write_tokens=4))
    await worker.send(wire.TokenRow(1, [6, 7], [second, second]))
    await worker.send(wire.TokenRow(1, [8], [first], "stop", 8))
    await steps(connection, 3)
    rows = [row async for row in stream]
    assert rows == [
        wire.TokenRow(
            1,
            [5, 6, 7, 8],
            [first, second, second, first],
            "stop",
            8,
            cached_tokens=3,
            cache_write_tokens=4,
        )
    ]


async def test_what_came_before_an_error_is_delivered_first(ends):
    connection, worker = ends
    stream = open_stream(connection)
    await worker.send(wire.TokenRow(1, [5]))
    await worker.send(wire.TokenRow(1, [], finish_reason="error", error=("step_failed", "why")))
    await steps(connection, 2)
    got = []
    with pytest.raises(errors.ServerError, match="why"):
        async for row in stream:
            got += row.token_ids
    assert got == [5]


async def test_a_stream_is_paused_once_and_resumed_once(ends):
    connection, worker = ends
    stream = open_stream(connection)
    assert [type(m) for m in await worker.receive()] == [wire.Submit]
    for k in range(HIGH_WATER_TOKENS + 10):
        await worker.send(wire.TokenRow(1, [k]))
    await steps(connection, HIGH_WATER_TOKENS + 10)
    assert await worker.receive() == [wire.Pause(1)]
    rows = aiter(stream)
    assert len((await anext(rows)).token_ids) == HIGH_WATER_TOKENS + 10
    assert await worker.receive() == [wire.Resume(1)]
    await rows.aclose()
    assert await worker.receive() == [wire.Cancel(1)]


async def test_rows_that_cross_a_cancel_are_ignored(ends):
    connection, worker = ends
    gone, stays = open_stream(connection, 1), open_stream(connection, 2)
    gone.cancel()
    gone.cancel()
    await worker.send(wire.TokenRow(1, [5]), wire.TokenRow(2, [6], None, "length"))
    assert [row.token_ids async for row in stays] == [[6]]
    assert [row async for row in gone] == []
    sent = await worker.receive()
    assert [m for m in sent if isinstance(m, wire.Cancel)] == [wire.Cancel(1)]


async def test_a_lost_connection_is_told_and_then_abandoned(ends):
    connection, worker = ends
    stream = open_stream(connection)
    load = asyncio.create_task(connection.load_model("m", "any"))
    unload = asyncio.create_task(connection.unload_model("n"))
    clear = asyncio.create_task(connection.clear_cache("n"))
    await worker.receive()
    worker.close()
    await connection.lost
    connection.abandon(errors.WorkerDied("of this"))
    for waiter in (anext(aiter(stream)), load, unload, clear, connection.hello):
        with pytest.raises(errors.WorkerDied, match="of this"):
            await waiter


async def test_the_last_words_of_a_worker_are_heard_even_if_it_died_before_it_read(ends):
    connection, worker = ends
    stream = open_stream(connection)
    worker.say(wire.Started([1]), wire.Phase("loading", "m", 0.0))
    worker.close()
    connection.send(wire.UnloadModel("m"))  # a broken pipe, for both loops before they read
    await connection.lost
    assert stream.starting
    assert connection.phase is not None and connection.phase.phase == "loading"
