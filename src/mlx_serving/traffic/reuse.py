"""Whether a sequence has to be computed: perhaps one like it is running."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from mlx_serving.traffic.coalesce import Flights
from mlx_serving.traffic.source import Ask, RowSource, digest

Coalescing = Literal["off", "deterministic", "all"]


class Reuse:
    """`open` is the one way to a sequence's rows. `on_join(ask)`: a sequence was not started."""

    def __init__(
        self,
        coalesce: Coalescing,
        max_subscribers: int,
        on_join: Callable[[Ask], None] = lambda _: None,
    ) -> None:
        self.coalesce = coalesce
        self.flights = Flights(max_subscribers, on_join)

    async def open(self, ask: Ask, start: Callable[[], RowSource]) -> RowSource:
        """The rows that `ask` wants: another request's, or those that `start` begins.

        Raises what `start` raises.
        """
        if not self._may_share(ask):
            return start()
        key = digest(ask)
        joined = self.flights.join(key, ask) if ask.caching == "use" else None
        return joined or self.flights.start(key, ask, start())

    def _may_share(self, ask: Ask) -> bool:
        if ask.caching == "none" or self.coalesce == "off":
            return False
        return ask.deterministic or self.coalesce == "all"
