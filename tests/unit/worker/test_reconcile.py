from __future__ import annotations

import asyncio
import socket

from mlx_serving.worker import wire
from mlx_serving.worker.reconcile import Differences, compare
from mlx_serving.worker.supervisor import Supervisor


def test_a_new_process_has_nothing_to_put_right():
    assert compare(["a", "b"], [], []) == Differences((), ())


def test_what_nobody_asked_for_goes():
    assert compare(["a", "b"], ["b", "old"], [7, 9]) == Differences(("old",), (7, 9))


class Process:
    """One whose end of the socket is in the test's hands."""

    pid = 1

    def __init__(self) -> None:
        self.socket, self.theirs = socket.socketpair()
        self.theirs.setblocking(False)
        self.exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def kill(self) -> None:
        if not self.exited.done():
            self.exited.set_result(-9)

    def explain(self) -> None:
        pass

    def cause(self, status: int) -> str:
        return f"ended with {status}"


async def test_a_worker_that_connects_with_leftovers_is_told_to_drop_them():
    process = Process()
    supervisor = Supervisor(spawn=lambda: process)
    supervisor.start()
    hello = wire.Hello(models=("old",), sequences=(7, 9))
    loop, splitter = asyncio.get_running_loop(), wire.FrameSplitter()
    await loop.sock_sendall(process.theirs, wire.encode(hello))
    told: list[wire.ToWorker] = []
    async with asyncio.timeout(120):
        while len(told) < 3:
            data = await loop.sock_recv(process.theirs, 65536)
            told += [wire.decode_to_worker(body) for body in splitter.feed(data)]
    assert told == [wire.Cancel(7), wire.Cancel(9), wire.UnloadModel("old")]
    await supervisor.stop(deadline_s=0.01)
    process.theirs.close()
