"""Streams that have no worker: new ones that came while there was none, and those of a worker
that died. Each waits a bounded time; then it is told why."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from mlx_serving.errors import MLXServingError
from mlx_serving.worker.client import SequenceStream


class Backlog:
    """`give_up(stream)`: the error for one whose time is over."""

    def __init__(self, give_up: Callable[[SequenceStream], MLXServingError]) -> None:
        self._give_up = give_up
        self._timers: dict[SequenceStream, asyncio.TimerHandle] = {}

    def __len__(self) -> int:
        return sum(not stream.ended for stream in self._timers)

    def has_room(self, limit: int) -> bool:
        """Those that were cancelled while they waited do not count."""
        if len(self._timers) >= limit:
            for stream in [stream for stream in self._timers if stream.ended]:
                self._timers.pop(stream).cancel()
        return len(self._timers) < limit

    def add(self, stream: SequenceStream, timeout_s: float) -> None:
        loop = asyncio.get_running_loop()
        self._timers[stream] = loop.call_later(timeout_s, self._expire, stream)

    def take(self) -> list[SequenceStream]:
        """All that still wait, in the order in which they came."""
        timers, self._timers = self._timers, {}
        for timer in timers.values():
            timer.cancel()
        return [stream for stream in timers if not stream.ended]

    def _expire(self, stream: SequenceStream) -> None:
        del self._timers[stream]
        stream.fail(self._give_up(stream))
