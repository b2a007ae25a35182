"""Identical requests that run at the same time share one sequence.

    RowSource ──pump──▶ Transcript ◀──cursor── Subscriber   (one a request)
                                   ◀──cursor── Subscriber

What the sequence has said is kept once and a subscriber is a position in it: each reads at its own
pace, a late one gets all that there is at once, and memory is bounded by the sequence's length. The
sequence runs at most `AHEAD_TOKENS` ahead of its fastest reader, and is cancelled when the last leaves.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator, Callable

from mlx_serving.errors import MLXServingError, ServerError
from mlx_serving.traffic.source import Ask, Reused, RowSource
from mlx_serving.traffic.transcript import Transcript
from mlx_serving.worker.wire import TokenRow

AHEAD_TOKENS = 256
"""Undelivered tokens at which the sequence is no longer read, so that the worker sets it aside."""


class Flight:
    """One running sequence and those who read it. `on_end` is called once, when nobody may join
    any more."""

    def __init__(
        self,
        key: bytes,
        ask: Ask,
        source: RowSource,
        on_end: Callable[[Flight], None] = lambda _: None,
    ) -> None:
        self.key = key
        self.ask = ask
        self.kept = False
        """Its answer went into the response cache."""
        self.transcript = Transcript()
        self.error: MLXServingError | None = None
        self.ended = False
        self.source = source
        self.readers: list[Subscriber] = []
        self._on_end: Callable[[Flight], None] | None = on_end
        self._room: asyncio.Future[None] | None = None
        self._pumping = asyncio.create_task(self._pump(), name="coalesced sequence")

    def join(self, reused: Reused) -> Subscriber:
        reader = Subscriber(self, reused)
        self.readers.append(reader)
        return reader

    def leave(self, reader: Subscriber) -> None:
        self.readers.remove(reader)
        if not self.readers:
            self.source.cancel()
            self._pumping.cancel()
            self._end()
        else:
            self.advanced()

    def advanced(self) -> None:
        """A reader has read, or left: there may be room for more."""
        if self._room is not None and not self._room.done() and self._lead() < AHEAD_TOKENS:
            self._room.set_result(None)

    async def _pump(self) -> None:
        try:
            async for row in self.source:
                self.transcript.add(row)
                self._wake()
                while self._lead() >= AHEAD_TOKENS and row.finish_reason is None:
                    self._room = asyncio.get_running_loop().create_future()
                    await self._room
        except MLXServingError as error:
            self.error = error
        except Exception as error:
            self.error = ServerError(f"The shared sequence failed: {error!r}")
        finally:
            self._end()
            self._wake()

    def _lead(self) -> int:
        furthest = max((reader.read for reader in self.readers), default=0)
        return len(self.transcript.token_ids) - furthest

    def _end(self) -> None:
        self.ended = True
        if self._on_end is not None:
            on_end, self._on_end = self._on_end, None
            on_end(self)

    def _wake(self) -> None:
        for reader in self.readers:
            reader.wake()


class Subscriber:
    """One request's reading of a flight; a `RowSource`."""

    def __init__(self, flight: Flight, reused: Reused) -> None:
        self.flight = flight
        self.reused: Reused = reused
        self.read = 0
        """Tokens that it has taken."""
        self._left = False
        self._waiter: asyncio.Future[None] | None = None

    @property
    def seed(self) -> int:
        return self.flight.ask.sampling.seed

    @property
    def begun(self) -> bool:
        return self.flight.source.begun

    @property
    def begun_s(self) -> float | None:
        return self.flight.source.begun_s

    def __aiter__(self) -> AsyncIterator[TokenRow]:
        return self._rows()

    def cancel(self) -> None:
        if not self._left:
            self._left = True
            self.flight.leave(self)
            self.wake()

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _rows(self) -> AsyncIterator[TokenRow]:
        flight, said = self.flight, self.flight.transcript
        try:
            while not self._left:
                end = len(said.token_ids)
                if end > self.read or said.finish_reason is not None:
                    if self.reused == "miss":
                        found, written = said.cached_tokens, said.cache_write_tokens
                    else:  # who follows another's sequence had none of its prompt computed
                        found, written = len(flight.ask.token_ids), 0
                    row = said.row(self.read, end, found, written)
                    self.read = end
                    flight.advanced()
                    yield row
                    if row.finish_reason is not None:
                        return
                elif flight.error is not None:
                    raise copy.copy(flight.error).with_traceback(None)
                elif flight.ended:
                    return
                else:
                    self._waiter = asyncio.get_running_loop().create_future()
                    await self._waiter
        finally:
            self.cancel()


class Flights:
    """The flights that may be joined, by the digest of what was asked for."""

    def __init__(self, max_subscribers: int, on_join: Callable[[Ask], None]) -> None:
        self.max_subscribers = max_subscribers
        self._on_join = on_join
        self._open: dict[bytes, Flight] = {}

    def __len__(self) -> int:
        return len(self._open)

    def join(self, key: bytes, ask: Ask) -> Subscriber | None:
        """None: nothing of the kind runs, it is full, or it may be served later or given up sooner than
        `ask` may."""
        flight = self._open.get(key)
        if flight is None or len(flight.readers) >= self.max_subscribers:
            return None
        if flight.ask.priority > ask.priority or _sooner(flight.ask, ask):
            return None
        self._on_join(ask)
        return flight.join("shared")

    def start(self, key: bytes, ask: Ask, source: RowSource) -> Subscriber:
        """Begin a flight that later ones join, in the place of one that cannot be joined any more."""

        def ended(flight: Flight) -> None:
            if self._open.get(key) is flight:
                del self._open[key]

        flight = self._open[key] = Flight(key, ask, source, ended)
        return flight.join("miss")


def _sooner(one: Ask, other: Ask) -> bool:
    """Whether `one` is given up sooner."""
    deadline_s, others_s = one.turn.deadline_s, other.turn.deadline_s
    return deadline_s is not None and (others_s is None or deadline_s < others_s)
