"""Answers in this process."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from mlx_serving import clock
from mlx_serving.traffic.stores.port import Bounds, Size


@dataclass(frozen=True, slots=True)
class _Entry:
    value: bytes
    tokens: int
    expires_s: float


class MemoryStore:
    def __init__(self, bounds: Bounds, now: clock.Clock = clock.monotonic) -> None:
        self.bounds = bounds
        self._now = now
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        """The least recently used first."""
        self._tokens = self._bytes = 0

    async def get(self, key: bytes) -> bytes | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        if self._now() >= entry.expires_s:
            self._remove(key)
            return None
        self._entries.move_to_end(key)
        return entry.value

    async def put(self, key: bytes, value: bytes, tokens: int) -> None:
        self._remove(key)
        if self.bounds.admit(tokens, len(value)):
            self._entries[key] = _Entry(value, tokens, self._now() + self.bounds.ttl_s)
            self._tokens += tokens
            self._bytes += len(value)
        while not self.size().within(self.bounds):
            self._remove(next(iter(self._entries)))

    async def drop(self, key: bytes) -> None:
        self._remove(key)

    def size(self) -> Size:
        return Size(len(self._entries), self._tokens, self._bytes)

    async def close(self) -> None:
        self._entries.clear()
        self._tokens = self._bytes = 0

    def _remove(self, key: bytes) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._tokens -= entry.tokens
            self._bytes -= len(entry.value)
