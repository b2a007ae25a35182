"""Whether a sequence has to be computed: perhaps its answer is kept, or one like it is running.

Ask ─▶ response cache ─hit─▶ Replay
          │ miss
          ▼
       flights ─one like it runs─▶ Subscriber
          │ none
          ▼
       start ─▶ Flight, which the response cache keeps when its answer is complete
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

from mlx_serving.traffic.coalesce import Flight, Flights, Subscriber
from mlx_serving.traffic.response_cache import Replay, ResponseCache
from mlx_serving.traffic.source import Ask, RowSource, digest

Coalescing = Literal["off", "deterministic", "all"]


class Reuse:
    """`open` is the one way to a sequence's rows. `on_join(ask)`: a sequence was not started."""

    def __init__(
        self,
        coalesce: Coalescing,
        max_subscribers: int,
        on_join: Callable[[Ask], None] = lambda _: None,
        cache: ResponseCache | None = None,
    ) -> None:
        self.coalesce = coalesce
        self.cache = cache
        self.flights = Flights(max_subscribers, on_join)

    async def open(self, ask: Ask, start: Callable[[], RowSource]) -> RowSource:
        """The rows that `ask` wants: kept ones, another request's, or those that `start` begins.

        Raises what `start` raises.
        """
        cache = self.cache if ask.deterministic else None
        shares = self.coalesce == "all" or (self.coalesce != "off" and ask.deterministic)
        if ask.caching == "none" or not (shares or cache):
            return start()
        key = digest(ask)
        if ask.caching == "use":
            kept = await cache.find(key) if cache else None
            if kept is not None:
                return Replay(kept, ask)
            joined = self.flights.join(key, ask) if shares else None
            if joined is not None:
                return joined
        if shares:
            return self.flights.start(key, ask, start())
        return Flight(key, ask, start()).join("miss")

    def keep(self, sources: Iterable[RowSource]) -> None:
        """Their readers have their whole answers: those that were computed may be told again."""
        if self.cache is None:
            return
        for source in sources:
            if isinstance(source, Subscriber) and source.flight.ask.deterministic:
                flight = source.flight
                if not flight.kept:
                    flight.kept = True
                    self.cache.keep(flight.key, flight.transcript)

    async def change(
        self, coalesce: Coalescing, max_subscribers: int, cache: ResponseCache | None
    ) -> None:
        """For sequences that are asked for from now on; those that run stay shared."""
        self.coalesce, self.flights.max_subscribers = coalesce, max_subscribers
        before, self.cache = self.cache, cache
        if before is not None and before is not cache:
            await before.close()

    async def close(self) -> None:
        if self.cache is not None:
            await self.cache.close()
