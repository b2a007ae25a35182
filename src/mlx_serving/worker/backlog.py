"""Streams that have no worker: new ones that came while there was none, and those of a worker
that died. Each waits a bounded time; then it is told why.

    park ─────▶ ┌─────────┐             ┌─ free: at once ───────────▶ worker
                │ waiting │ ─hand_over──┤                                ▲
    orphaned ─▶ └─────────┘             └─ suspects: one at a time ──────┤
       └── who is to blame too often fails    new ones, where those go alone: after them
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from mlx_serving.errors import MLXServingError, WorkerDied
from mlx_serving.worker import blame
from mlx_serving.worker.client import SequenceStream


class Backlog:
    """`give_up(stream)`: the error for one whose time is over; `max_deaths`: `blame`'s limit."""

    def __init__(
        self, give_up: Callable[[SequenceStream], MLXServingError], max_deaths: int
    ) -> None:
        self._give_up = give_up
        self._max_deaths = max_deaths
        self._timers: dict[SequenceStream, asyncio.TimerHandle] = {}
        self._suspects: list[SequenceStream] = []
        self._send: Callable[[SequenceStream], bool] | None = None
        self.holds = False
        """Suspects are tried alone: who has had no token waits for them."""

    def __len__(self) -> int:
        return sum(not stream.ended for stream in (*self._timers, *self._suspects))

    def has_room(self, limit: int) -> bool:
        """Those that were cancelled while they waited do not count."""
        if len(self._timers) >= limit:
            for stream in [stream for stream in self._timers if stream.ended]:
                self._timers.pop(stream).cancel()
        return len(self._timers) < limit

    def park(self, stream: SequenceStream, timeout_s: float) -> None:
        loop = asyncio.get_running_loop()
        self._timers[stream] = loop.call_later(timeout_s, self._expire, stream)

    def orphaned(self, streams: Iterable[SequenceStream], timeout_s: float, cause: str) -> None:
        """Their worker has died of `cause`."""
        verdict = blame.judge(
            [stream for stream in (*streams, *self._suspects) if not stream.ended], self._max_deaths
        )
        self._suspects, self._send, self.holds = [], None, False
        for stream in (*verdict.free, *verdict.suspects):
            self.park(stream, timeout_s)
        for stream in verdict.guilty:
            stream.fail(
                WorkerDied(
                    f"given up: {stream.deaths} workers in a row died as they began this "
                    f"sequence; the last: {cause}"
                )
            )

    def hand_over(self, send: Callable[[SequenceStream], bool]) -> None:
        """Everybody goes to a new worker. `send` says whether it went; if not, the stream failed."""
        waiting = [stream for stream in self._timers if not stream.ended]
        verdict = blame.judge(waiting, self._max_deaths)
        self._suspects, self._send = verdict.suspects, send
        self.holds = blame.go_alone(verdict.suspects, self._max_deaths)
        held = {stream for stream in verdict.free if self.holds and not stream.begun}
        for stream in [stream for stream in self._timers if stream not in held]:
            self._timers.pop(stream).cancel()
        for stream in verdict.free:
            if stream not in held:
                send(stream)
        self._try_next()

    def end(self, why: Callable[[SequenceStream], MLXServingError]) -> None:
        """Nobody waits any longer."""
        streams, self._suspects = [*self._take(), *self._suspects], []
        for stream in streams:
            stream.fail(why(stream))

    def _try_next(self) -> None:
        while self._send is not None and self._suspects:
            stream = self._suspects.pop(0)
            if not stream.ended and self._send(stream):
                stream.on_progress = self._try_next
                return
        if self.holds and (send := self._send) is not None:
            self.holds = False
            for stream in self._take():
                send(stream)

    def _take(self) -> list[SequenceStream]:
        timers, self._timers = self._timers, {}
        for timer in timers.values():
            timer.cancel()
        return [stream for stream in timers if not stream.ended]

    def _expire(self, stream: SequenceStream) -> None:
        del self._timers[stream]
        stream.fail(self._give_up(stream))
