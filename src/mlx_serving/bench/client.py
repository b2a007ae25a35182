"""A small HTTP/1.1 client that streams a completion and keeps the times of its tokens.

A general client's own parsing would be a large part of what is measured on a small machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Timing:
    """One streamed request. Times are seconds from when it was sent."""

    ttft_s: float = 0.0
    end_s: float = 0.0
    token_times_s: list[float] = field(default_factory=list)
    text: str = ""
    completion_tokens: int = 0
    """As the server's `usage` says."""

    @property
    def tpot_s(self) -> float:
        """Mean time per output token after the first."""
        later = self.completion_tokens - 1
        return (self.end_s - self.ttft_s) / later if later > 0 else 0.0


@contextlib.asynccontextmanager
async def _sent(
    host: str, port: int, method: str, path: str, body: bytes
) -> AsyncIterator[asyncio.StreamReader]:
    """Send a request; the answer can be read while the context lasts."""
    reader, writer = await asyncio.open_connection(host, port, limit=1 << 20)
    try:
        writer.write(
            f"{method} {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode()
            + body
        )
        await writer.drain()
        yield reader
    finally:
        writer.close()


async def _head(reader: asyncio.StreamReader) -> int:
    status = int((await reader.readline()).split()[1])
    while (await reader.readline()).strip():
        pass
    return status


async def get(host: str, port: int, path: str) -> tuple[int, bytes]:
    """Status and body. Raises OSError when nobody answers."""
    async with _sent(host, port, "GET", path, b"") as reader:
        return await _head(reader), await reader.read()


async def post(host: str, port: int, path: str, payload: dict[str, Any]) -> tuple[int, bytes]:
    async with _sent(host, port, "POST", path, json.dumps(payload).encode()) as reader:
        return await _head(reader), await reader.read()


async def stream(
    host: str,
    port: int,
    path: str,
    payload: dict[str, Any],
    *,
    on_token: Callable[[], None] = lambda: None,
) -> Timing:
    """Send one request with `stream: true`; raises RuntimeError on a status other than 200.
    `on_token` is called as each event arrives."""
    timing = Timing()
    body = {**payload, "stream": True, "stream_options": {"include_usage": True}}
    began_s = time.perf_counter()
    async with _sent(host, port, "POST", path, json.dumps(body).encode()) as reader:
        status = await _head(reader)
        if status != 200:
            raise RuntimeError(f"{path} answered {status}: {(await reader.read())[:500]!r}")
        async for line in reader:
            if line.startswith(b"data: {"):
                on_token()
                _note(timing, json.loads(line[6:]), time.perf_counter() - began_s)
    timing.end_s = timing.token_times_s[-1] if timing.token_times_s else 0.0
    return timing


def _note(timing: Timing, chunk: dict[str, Any], now_s: float) -> None:
    if "error" in chunk:
        raise RuntimeError(f"stream failed: {chunk['error']}")
    if usage := chunk.get("usage"):
        timing.completion_tokens = usage["completion_tokens"]
    for choice in chunk.get("choices", ()):
        text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
        if text:
            timing.ttft_s = timing.ttft_s or now_s
            timing.text += text
        if text or choice.get("finish_reason"):
            timing.token_times_s.append(now_s)
