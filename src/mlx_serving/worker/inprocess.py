"""The worker without a process: the same loop and wire, in a thread of this one.

For those who have a supervisor of their own (`supervise=False`): what aborts the runtime ends
the whole process, and a loop that has ended is not started again.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import math
import os
import socket
import threading
import traceback
from collections.abc import Callable

from mlx_serving.runtime import main as runtime
from mlx_serving.runtime.loads import Loader
from mlx_serving.worker.process import Process
from mlx_serving.worker.supervisor import Supervisor
from mlx_serving.worker.watchdog import Deadlines


class RuntimeThread:
    """process.Process over a thread. It cannot be killed: `kill` gives it up, and it ends with the
    process or when it next looks at its socket."""

    def __init__(self, load: Loader = runtime.load) -> None:
        self._load = load
        self.socket, self._theirs = socket.socketpair()
        self.pid = os.getpid()
        self._loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[int] = self._loop.create_future()
        self._error = ""
        threading.Thread(target=self._serve, name="runtime", daemon=True).start()

    def kill(self) -> None:
        self._report(-1)

    def explain(self) -> None:
        faulthandler.dump_traceback()

    def cause(self, status: int) -> str:
        if self._error:
            return f"the runtime's thread failed:\n{self._error}"
        return "the runtime's thread did not end in time" if status else "the runtime ended"

    def _serve(self) -> None:
        status = 0
        try:
            runtime.serve(self._theirs, self._load)
        except BaseException:
            self._error = traceback.format_exc()
            status = 1
        with contextlib.suppress(RuntimeError):  # the event loop is closed
            self._loop.call_soon_threadsafe(self._report, status)

    def _report(self, status: int) -> None:
        if not self.exited.done():
            self.exited.set_result(status)


class InProcessWorker(Supervisor):
    """port.WorkerClient over a thread, never restarted; only a load is watched."""

    def __init__(
        self, *, load_timeout_s: float = math.inf, spawn: Callable[[], Process] = RuntimeThread
    ) -> None:
        super().__init__(deadlines=_of_loads(load_timeout_s), revive=False, spawn=spawn)

    def bound(self, deadlines: Deadlines, resume_timeout_s: float, rss_limit_bytes: int) -> None:
        super().bound(_of_loads(deadlines.load_s), resume_timeout_s, rss_limit_bytes)


def _of_loads(load_s: float) -> Deadlines:
    return Deadlines(math.inf, math.inf, load_s, math.inf)
