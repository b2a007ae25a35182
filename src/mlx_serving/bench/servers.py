"""Start a server as a user would, wait until it answers, and end it with everything it started."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_serving.bench import client


@dataclass(slots=True)
class Server:
    name: str
    host: str
    port: int
    process: subprocess.Popen[bytes]
    answered_s: float = 0.0
    """From the command's start to the first answer of the readiness path."""
    ready_s: float = 0.0

    def cpu_s(self) -> float:
        """CPU seconds, user and system, of the server's own process (Linux)."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def rss_bytes(self) -> int:
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) * 1024
        return 0


async def metric(server: Server, name: str, label: str = "") -> float:
    """The sum over a metric's series that have `label`."""
    _, text = await client.get(server.host, server.port, "/metrics")
    lines = re.findall(rf"^{name}\{{(.*)\}} (\S+)$", text.decode(), re.MULTILINE)
    return sum(float(value) for labels, value in lines if label in labels)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def ours(*args: str) -> list[str]:
    return [sys.executable, "-m", "mlx_serving", "serve", *args]


def serving(folder: Path, *flags: str) -> contextlib.AbstractAsyncContextManager[Server]:
    """Ours, ready, with a model that requests call `bench`."""
    port = free_port()
    command = ours(str(folder), "--port", str(port), "--served-model-name", "bench", *flags)
    return running("ours", command, port=port, ready="/ready")


@contextlib.asynccontextmanager
async def running(
    name: str,
    command: Sequence[str],
    *,
    port: int,
    health: str = "/health",
    ready: str | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 300.0,
) -> AsyncIterator[Server]:
    """Run `command`; yield once `health` answers at all and `ready` (default: `health`) with 200."""
    with tempfile.NamedTemporaryFile(prefix=f"bench-{name}-", suffix=".log") as log:
        began_s = time.perf_counter()
        process = await asyncio.to_thread(_spawn, command, log.fileno(), dict(env or {}))
        server = Server(name, "127.0.0.1", port, process)
        try:
            await _until(server, health, (200, 503), began_s + timeout_s, log.name)
            server.answered_s = time.perf_counter() - began_s
            await _until(server, ready or health, (200,), began_s + timeout_s, log.name)
            server.ready_s = time.perf_counter() - began_s
            yield server
        finally:
            await asyncio.to_thread(_end, process)


def _spawn(command: Sequence[str], log: int, env: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command, stdout=log, stderr=log, env={**os.environ, **env}, start_new_session=True
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _tail(log: str) -> str:
    return Path(log).read_text(errors="replace")[-2000:]


async def _until(
    server: Server, path: str, wanted: Sequence[int], deadline_s: float, log: str
) -> None:
    while True:
        with contextlib.suppress(OSError, ValueError, IndexError):
            status, _ = await client.get(server.host, server.port, path)
            if status in wanted:
                return
        if server.process.poll() is not None:
            raise RuntimeError(
                f"{server.name} ended with {server.process.returncode}: {_tail(log)}"
            )
        if time.perf_counter() > deadline_s:
            raise RuntimeError(f"{server.name} did not answer {path}: {_tail(log)}")
        await asyncio.sleep(0.005)
