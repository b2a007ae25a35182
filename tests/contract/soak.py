"""Thousands of requests by impatient, broken and polite clients, and what they leave in the server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

SERVER = """
import asyncio, signal, sys

def tell(*_):
    with open({tasks!r}, "w") as file:
        file.write(str(len(asyncio.all_tasks())) + "\\n")

signal.signal(signal.SIGUSR2, tell)
from mlx_serving.cli import main
main(["serve", *sys.argv[1:]])
"""


@dataclass(frozen=True)
class Holdings:
    """What a server has of what it must give back."""

    gateway_bytes: int
    worker_bytes: int
    gateway_files: int
    worker_files: int
    tasks: int


class Server:
    def __init__(
        self, process: subprocess.Popen[str], address: tuple[str, int], tasks: Path
    ) -> None:
        self.address = address
        self.gateway = psutil.Process(process.pid)
        (self.worker,) = self.gateway.children()
        self._tasks = tasks

    def holdings(self) -> Holdings:
        self._tasks.unlink(missing_ok=True)
        self.gateway.send_signal(signal.SIGUSR2)
        eventually(lambda: self._tasks.exists() and self._tasks.read_text().endswith("\n"))
        return Holdings(
            gateway_bytes=self.gateway.memory_info().rss,
            worker_bytes=self.worker.memory_info().rss,
            gateway_files=self.gateway.num_fds(),
            worker_files=self.worker.num_fds(),
            tasks=int(self._tasks.read_text()),
        )


@contextmanager
def serving(model: Path, folder: Path, *flags: str) -> Iterator[Server]:
    tasks = folder / "tasks"
    command = [sys.executable, "-c", SERVER.format(tasks=str(tasks)), str(model), "--json"]
    process = subprocess.Popen(
        [*command, "--port", "0", "--log-level", "error", *flags],
        stdout=subprocess.PIPE,
        text=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("MLX_SERVING_")},
    )
    try:
        assert process.stdout is not None
        host, port = json.loads(process.stdout.readline())["url"].removeprefix("http://").split(":")
        assert json.loads(process.stdout.readline())["event"] == "model_loaded"
        yield Server(process, (host, int(port)), tasks)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def eventually(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it never became true"
        time.sleep(0.01)


def request(
    body: dict[str, object], *, path: str = "/v1/completions", close: bool = False
) -> bytes:
    data = json.dumps(body).encode()
    end = "close" if close else "keep-alive"
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: {end}\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


class Connection:
    """HTTP by hand: a client library would cost more than the server."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address

    async def __aenter__(self) -> Connection:
        self.reader, self.writer = await asyncio.open_connection(*self._address)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()

    async def ask(self, sent: bytes) -> tuple[int, bytes]:
        self.writer.write(sent)
        head = await self.reader.readuntil(b"\r\n\r\n")
        status = int(head.split(b" ", 2)[1])
        for line in head.split(b"\r\n"):
            if line.startswith(b"content-length: "):
                return status, await self.reader.readexactly(int(line[16:]))
        return status, b"".join([chunk async for chunk in self._chunks()])

    async def begin(self, sent: bytes) -> None:
        """Send, and read the beginning of an answer."""
        self.writer.write(sent)
        await self.reader.read(64)

    async def _chunks(self) -> AsyncIterator[bytes]:
        while size := int(await self.reader.readline(), 16):
            yield (await self.reader.readexactly(size + 2))[:-2]
        await self.reader.readexactly(2)


@dataclass(frozen=True)
class Question:
    prompt: str
    completed: str
    """What follows the prompt as it is."""
    answered: str
    """What follows it as a user's message."""


@dataclass
class Soak:
    """`clients` at once, until `requests` have been made. `outcomes` counts what became of them."""

    address: tuple[str, int]
    question: Callable[[random.Random], Question]
    max_tokens: int
    requests: int
    clients: int = 32
    seed: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    _left: int = 0

    async def run(self) -> None:
        self._left = self.requests
        async with asyncio.TaskGroup() as group:
            for client in range(self.clients):
                group.create_task(self._client(random.Random(self.seed * 1000 + client)))

    async def _client(self, draw: random.Random) -> None:
        while self._left > 0:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                async with Connection(self.address) as connection:
                    for _ in range(draw.randint(1, 20)):
                        if self._left <= 0 or not await self._one(connection, draw):
                            break

    async def _one(self, connection: Connection, draw: random.Random) -> bool:
        """One request; whether the connection can go on."""
        self._left -= 1
        kind = draw.choices(
            ["whole", "stream", "chat", "wrong", "leave", "leave early", "half", "junk"],
            [40, 20, 15, 8, 8, 4, 3, 2],
        )[0]
        self.outcomes[kind] += 1
        question = self.question(draw)
        wanted = {"max_tokens": self.max_tokens, "temperature": 0}
        body: dict[str, object] = {"prompt": question.prompt, **wanted}
        match kind:
            case "whole":
                status, data = await connection.ask(request(body))
                assert status == 200, data
                assert json.loads(data)["choices"][0]["text"] == question.completed
            case "stream":
                status, data = await connection.ask(request(body | {"stream": True}))
                assert status == 200 and _streamed(data) == question.completed, data
            case "chat":
                messages = [{"role": "user", "content": question.prompt}]
                sent = request({"messages": messages, **wanted}, path="/v1/chat/completions")
                status, data = await connection.ask(sent)
                assert status == 200, data
                assert json.loads(data)["choices"][0]["message"]["content"] == question.answered
            case "wrong":
                status, data = await connection.ask(request(body | {"temperature": 9}))
                assert status == 400, data
            case "leave":
                await connection.begin(request(body | {"stream": True}))
                return False
            case "leave early":
                connection.writer.write(request(body))
                await connection.writer.drain()
                return False
            case "half":
                connection.writer.write(request(body | {"stream": True}))
                connection.writer.write_eof()
                await connection.reader.read()
                return False
            case "junk":
                connection.writer.write(b"\x00junk\r\n\r\n")
                assert b" 400 " in await connection.reader.read()
                return False
        return True


def _streamed(data: bytes) -> str:
    events = [line[6:] for line in data.decode().split("\n\n") if line.startswith("data: {")]
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)


async def all_at_once(address: tuple[str, int], sent: Sequence[bytes]) -> list[tuple[int, bytes]]:
    """Every request on a connection of its own, all of them open before the first is sent."""
    async with contextlib.AsyncExitStack() as stack:
        connections = [Connection(address) for _ in sent]
        for start in range(0, len(sent), 100):  # a listener's backlog is finite
            await asyncio.gather(
                *(stack.enter_async_context(c) for c in connections[start : start + 100])
            )
        return await asyncio.gather(*(c.ask(one) for c, one in zip(connections, sent, strict=True)))
