"""Against a stand-in for the service manager's socket."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Iterator

import pytest

from mlx_serving.cli.notify import Notifier


@pytest.fixture
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[socket.socket, str]]:
    path = str(tmp_path_factory.mktemp("n") / "s")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(path)
        sock.settimeout(120)
        yield sock, path


def told(sock: socket.socket) -> set[str]:
    return set(sock.recv(4096).decode().split("\n"))


async def test_the_states(manager: tuple[socket.socket, str]) -> None:
    sock, path = manager
    notifier = Notifier({"NOTIFY_SOCKET": path})
    notifier.ready("loading")
    notifier.status("ready")
    notifier.stopping(30)
    notifier.close()
    assert told(sock) == {"READY=1", "STATUS=loading"}
    assert told(sock) == {"STATUS=ready"}
    assert told(sock) == {"STOPPING=1", "STATUS=draining", "EXTEND_TIMEOUT_USEC=35000000"}


async def test_the_watchdog_is_fed(manager: tuple[socket.socket, str]) -> None:
    sock, path = manager
    loop = asyncio.get_running_loop()
    env = {"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "20000", "WATCHDOG_PID": str(os.getpid())}
    notifier = Notifier(env)
    notifier.ready("x")
    said = [await loop.run_in_executor(None, told, sock) for _ in range(4)]
    notifier.close()
    assert said[1:] == [{"WATCHDOG=1"}] * 3


async def test_another_process_s_watchdog_is_not_ours(manager: tuple[socket.socket, str]) -> None:
    sock, path = manager
    notifier = Notifier({"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"})
    notifier.ready("x")
    await asyncio.sleep(0.01)
    notifier.status("last")
    assert [told(sock), told(sock)] == [{"READY=1", "STATUS=x"}, {"STATUS=last"}]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's abstract sockets")
async def test_an_abstract_socket() -> None:
    name = f"mlx-serving-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + name)
        Notifier({"NOTIFY_SOCKET": "@" + name}).status("x")
        assert told(sock) == {"STATUS=x"}


@pytest.mark.parametrize("path", ["", "relative", "/nowhere/at/all"])
async def test_without_a_manager_nothing_happens(path: str) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "1000"})
    notifier.ready("x")
    notifier.stopping(1)
    notifier.close()


async def test_a_manager_that_does_not_read_blocks_nobody(
    manager: tuple[socket.socket, str],
) -> None:
    _, path = manager
    notifier = Notifier({"NOTIFY_SOCKET": path})
    for _ in range(5000):
        notifier.status("x" * 100)
