"""The worker's end of the socket: frames out and in, a bell for its other threads, and the pulse that
says what the loop is at."""

from __future__ import annotations

import select
import socket
import threading
from contextlib import suppress
from typing import Literal

from mlx_serving import clock, host
from mlx_serving.worker import wire

RECEIVE_BYTES = 256 * 1024
SEND_BUFFER_BYTES = 1024 * 1024


class Link:
    """The worker's end of the socket. One thread receives; any thread may send."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        self._sock = sock
        self._splitter = wire.FrameSplitter()
        self._sending = threading.Lock()
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._bell, self._clapper = socket.socketpair()
        self._bell.setblocking(False)
        self._clapper.setblocking(False)
        self._poll.register(self._bell, select.POLLIN)

    def send(self, message: wire.FromWorker) -> None:
        """Blocks while the parent does not read: it is then busy, and so are its readers.
        Raises OSError once the parent has gone."""
        with self._sending:
            self._sock.sendall(wire.encode(message))

    def wait(self, timeout_s: float) -> bool:
        """Sleep until something (or the end) can be received, or somebody rings. False: in vain."""
        woken = self._poll.poll(timeout_s * 1000)
        with suppress(BlockingIOError):
            self._bell.recv(RECEIVE_BYTES)
        return bool(woken)

    def ring(self) -> None:
        """Wake whoever waits, or is about to; from any thread, at any time."""
        with suppress(OSError):  # it rings already, or nobody is there any more
            self._clapper.send(b"!")

    def close(self) -> None:
        """The bell's; the socket is its owner's."""
        self._bell.close()
        self._clapper.close()

    def receive(self) -> list[wire.ToWorker]:
        """What has arrived, without waiting. Raises EOFError when the parent closed the socket."""
        try:
            data = self._sock.recv(RECEIVE_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        if not data:
            raise EOFError
        return [wire.decode_to_worker(body) for body in self._splitter.feed(data)]


PhaseName = Literal["idle", "loading", "compiling", "stepping"]


class Pulse:
    """Tells the parent what the loop is at, and repeats it from a thread of its own while that lasts:
    a step or a load may take minutes, and only a process that stands still may fall silent.

    While the loop is idle the thread sleeps, and the loop's own heartbeats take over.
    """

    def __init__(self, link: Link, every_s: float, now: clock.Clock) -> None:
        self._link = link
        self._every_s = every_s
        self._now = now
        self._began_s = now()
        self._detail = ""
        self._busy = threading.Event()
        self._ended = threading.Event()
        self.phase: PhaseName = "idle"
        threading.Thread(target=self._repeat, name="pulse", daemon=True).start()

    def enter(self, phase: PhaseName, detail: str = "", *, anew: bool = False) -> None:
        """`anew`: another one of the same kind begins. Raises OSError once the parent has gone."""
        if anew or phase != self.phase:
            self._began_s = self._now()
        self.phase, self._detail = phase, detail
        self._tell()
        if phase == "idle":
            self._busy.clear()
        else:
            self._busy.set()

    def end(self) -> None:
        self._ended.set()
        self._busy.set()

    def _tell(self, rss_bytes: int = 0) -> None:
        elapsed_s = 0.0 if self.phase == "idle" else self._now() - self._began_s
        self._link.send(wire.Phase(self.phase, self._detail, elapsed_s, rss_bytes))

    def _repeat(self) -> None:
        # The parent may have gone; the loop notices when it is back at its socket.
        with suppress(OSError):
            while self._busy.wait() and not self._ended.wait(self._every_s):
                if self._busy.is_set():
                    self._tell(host.rss_bytes())
