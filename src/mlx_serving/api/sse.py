"""Streamed answers on raw ASGI: the response's writer, and the watch on its client."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from types import TracebackType

from mlx_serving.api.exchange import ClientGone, Exchange, Headers

EVENT_STREAM = b"text/event-stream; charset=utf-8"
DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"


@dataclass(frozen=True, slots=True)
class Framing:
    """How a dialect's stream is cut into events."""

    content_type: bytes
    ping: bytes
    """Sent into silence; empty where clients would choke on it."""


SSE = Framing(EVENT_STREAM, PING)
NDJSON = Framing(b"application/x-ndjson", b"")
_HEADERS: Headers = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]

log = logging.getLogger(__name__)


class EventStream:
    """Writes events to one client. The response starts with the first write, so that what fails
    before it can still be a proper status."""

    __slots__ = ("_exchange", "_headers", "_lock", "framing", "started", "writes")

    def __init__(self, exchange: Exchange, headers: Headers, framing: Framing = SSE) -> None:
        self.framing = framing
        self._exchange = exchange
        self._headers = headers
        # A ping and a batch must not interleave around the response's start.
        self._lock = asyncio.Lock()
        self.started = False
        self.writes = 0

    @property
    def blocked(self) -> bool:
        """A write is waiting for the client to read."""
        return self._lock.locked()

    async def write(self, data: bytes, *, last: bool = False) -> None:
        """Send whole events; returns once the transport takes more."""
        async with self._lock:
            if not self.started:
                self.started = True
                await self._exchange.start(200, self.framing.content_type, _HEADERS + self._headers)
            self.writes += 1
            self._exchange.answered = last
            await self._exchange.send(
                {"type": "http.response.body", "body": data, "more_body": not last}
            )


class ClientWatch:
    """Cancels the body of an `async with` once the client is gone, raising ClientGone from it.

    While it runs, it also pings `stream` (once there is one) in every `ping_interval_s` in which
    nothing was written; 0 never pings.
    """

    def __init__(self, exchange: Exchange, ping_interval_s: float = 0.0) -> None:
        self.stream: EventStream | None = None
        self._exchange = exchange
        self._interval_s = ping_interval_s if ping_interval_s > 0 else None
        self.gone = False

    async def __aenter__(self) -> ClientWatch:
        owner = asyncio.current_task()
        assert owner is not None, "a watch needs a task to cancel"
        self._owner = owner
        self._cancelling = owner.cancelling()
        self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, _: TracebackType | None
    ) -> None:
        self._task.cancel()
        # As asyncio.timeout does: only our own cancellation becomes ClientGone.
        ours = self.gone and self._owner.uncancel() <= self._cancelling
        if ours and kind is not None and issubclass(kind, asyncio.CancelledError):
            raise ClientGone from exc

    async def _watch(self) -> None:
        try:
            while not await self._disconnected():
                await self._ping()
        except Exception:
            log.exception("[%s] watching the client failed", self._exchange.id)
        if not self._exchange.answered:
            self.gone = True
            self._owner.cancel()

    async def _disconnected(self) -> bool:
        """Wait for the end of the connection, at most one interval."""
        self._seen = self.stream.writes if self.stream else 0
        try:
            async with asyncio.timeout(self._interval_s):
                while (await self._exchange.receive())["type"] != "http.disconnect":
                    pass
        except TimeoutError:
            return False
        return True

    async def _ping(self) -> None:
        stream = self.stream
        if stream is None or not stream.framing.ping or stream.blocked:
            return
        if stream.writes == self._seen:
            await stream.write(stream.framing.ping)
