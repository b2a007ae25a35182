"""One worker process: started, listened to, reaped. Works on any event loop, in any thread."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from mlx_serving.config import SECRETS, env_name

log = logging.getLogger("mlx_serving.worker.stderr")
_LEVELS = logging.getLevelNamesMapping()
"""The worker's log writes one of these words, then `NAME: MESSAGE`."""

TAIL_LINES = 50
SECRET_VARIABLES = frozenset({*map(env_name, SECRETS), "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"})
"""A worker, which runs what models bring, has no use for them."""
UNUSED_VARIABLES = frozenset({"COVERAGE_PROCESS_CONFIG", "COVERAGE_PROCESS_START"})
"""A worker ends without exit hooks: what coverage counted there, at three times the cost, was never written."""
WITHHELD = SECRET_VARIABLES | UNUSED_VARIABLES
COMMAND = (sys.executable, "-u", "-m", "mlx_serving.runtime.main")


class Process(Protocol):
    """What the supervisor needs of whatever runs the loop."""

    socket: socket.socket
    """The parent's end; non-blocking use is the taker's business."""
    pid: int
    exited: asyncio.Future[int]

    def kill(self) -> None: ...
    def explain(self) -> None: ...
    def cause(self, status: int) -> str: ...


class WorkerProcess:
    """A child in a session of its own, with one end of a socket pair.

    A thread reads its output (kept: the last `TAIL_LINES`; logged: all) and reaps it, so that
    no child watcher of an event loop is needed. `exited` is a future of the exit status as
    `subprocess` gives it (negative: the signal's number).
    """

    def __init__(self, command: Sequence[str] = COMMAND) -> None:
        self.socket, theirs = socket.socketpair()
        try:
            with theirs:
                self._child = subprocess.Popen(
                    [*command, "--fd", str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,
                    text=True,
                    errors="replace",
                    env={k: v for k, v in os.environ.items() if k not in WITHHELD},
                )
        except BaseException:
            self.socket.close()
            raise
        self.pid = self._child.pid
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[int] = self._loop.create_future()
        # Not joined: the loop that it reports to may be closed before a worker that is being
        # killed has gone.
        threading.Thread(target=self._listen, name=f"worker-{self.pid}", daemon=True).start()

    def kill(self) -> None:
        """SIGKILL to the whole session; nothing if it has been reaped."""
        if self._child.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)

    def explain(self) -> None:
        """Have a stuck worker write where each of its threads is, among its last words."""
        if self._child.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(self.pid, signal.SIGUSR1)

    def cause(self, status: int) -> str:
        """How it ended, and its last words."""
        how = f"worker {self.pid} {_how(status)}"
        return f"{how}; its last lines:\n" + "\n".join(self.tail) if self.tail else how

    def _listen(self) -> None:
        assert self._child.stdout is not None
        with self._child.stdout as lines:
            for line in lines:
                self.tail.append(line.rstrip("\n"))
                level, text = _said(self.tail[-1])
                log.log(level, "%d: %s", self.pid, text)
        status = self._child.wait()
        with contextlib.suppress(RuntimeError):  # the event loop is closed
            self._loop.call_soon_threadsafe(self._report, status)

    def _report(self, status: int) -> None:
        if not self.exited.done():
            self.exited.set_result(status)


def _said(line: str) -> tuple[int, str]:
    """A line of the worker's output: the level that its log gave it, and the rest."""
    word, _, rest = line.partition(" ")
    level = _LEVELS.get(word)
    return (level, rest) if level is not None and ": " in rest else (logging.INFO, line)


def _how(status: int) -> str:
    if status >= 0:
        return f"exited with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"


async def ended(process: Process, deadline_s: float) -> int:
    """Wait for the exit; kill at the deadline. Returns the exit status: it is reaped."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(deadline_s):
            return await asyncio.shield(process.exited)
    process.kill()
    return await process.exited
