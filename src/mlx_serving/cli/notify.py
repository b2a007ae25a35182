"""What a service manager is told: systemd's notification protocol, a few datagrams.

Nothing is sent where no manager listens (no `NOTIFY_SOCKET`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Mapping


class Notifier:
    """Tells the manager of states, and that the event loop still turns."""

    def __init__(self, env: Mapping[str, str] = os.environ) -> None:
        self._address = _address(env)
        self._watchdog_s = _watchdog_s(env)
        self._task: asyncio.Task[None] | None = None

    def ready(self, status: str) -> None:
        """The server listens; from now on the watchdog is fed at half its interval."""
        self._send("READY=1", f"STATUS={status}")
        if self._address is not None and self._watchdog_s is not None:
            self._task = asyncio.create_task(self._feed(self._watchdog_s / 2))

    def status(self, text: str) -> None:
        self._send(f"STATUS={text}")

    def stopping(self, timeout_s: float) -> None:
        """Running streams may take `timeout_s` more."""
        extension_us = int((timeout_s + 5.0) * 1e6)
        self._send("STOPPING=1", "STATUS=draining", f"EXTEND_TIMEOUT_USEC={extension_us}")

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _feed(self, interval_s: float) -> None:
        while True:
            self._send("WATCHDOG=1")
            await asyncio.sleep(interval_s)

    def _send(self, *lines: str) -> None:
        if self._address is None:
            return
        # A manager that has gone away or does not read is no reason to fail.
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel,
        ):
            channel.setblocking(False)
            channel.connect(self._address)
            channel.send("\n".join(lines).encode())


def _address(env: Mapping[str, str]) -> str | None:
    path = env.get("NOTIFY_SOCKET", "")
    if path.startswith("@"):  # Linux's abstract namespace
        return "\0" + path[1:]
    return path if path.startswith("/") else None


def _watchdog_s(env: Mapping[str, str]) -> float | None:
    """The watchdog's interval, if it watches this process."""
    if env.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    interval_us = env.get("WATCHDOG_USEC", "")
    return int(interval_us) / 1e6 if interval_us.isdigit() and int(interval_us) else None
