"""Whether a request may enter now: a pure decision, and the small state it is made from."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlx_serving.errors import Draining, MLXServingError, Overloaded
from mlx_serving.types import Priority

MIN_RETRY_S = 1.0
MAX_RETRY_S = 120.0
SHED_RETRY_S = 30.0
_DECAY = 0.9


@dataclass(frozen=True, slots=True)
class Load:
    """What the decision looks at, for one class."""

    open_requests: int
    max_queue: int
    name: str
    draining: bool
    drain_left_s: float
    finish_interval_s: float
    """Mean time between two requests' ends of late; 0 when none has ended yet."""
    shed: bool = False
    """Requests of this class are refused for a service level's sake."""


def refusal(load: Load) -> MLXServingError | None:
    """None admits. A refusal says when to come back: when the queue will have moved by a tenth
    at the measured service rate."""
    if load.draining:
        return Draining(
            "The server is shutting down and accepts no new requests.",
            retry_after_s=max(MIN_RETRY_S, load.drain_left_s),
        )
    if load.shed:
        return Overloaded(
            "Requests of this class are refused until others are answered as promised.",
            code="shed",
            retry_after_s=SHED_RETRY_S,
        )
    if load.open_requests < load.max_queue:
        return None
    wait_s = load.finish_interval_s * math.ceil(load.max_queue / 10)
    return Overloaded(
        f"The server's queue for {load.name} requests is full "
        f"({load.open_requests} of {load.max_queue}).",
        retry_after_s=min(MAX_RETRY_S, max(MIN_RETRY_S, wait_s)),
    )


class Admission:
    """Counts open requests by class and measures how often one ends. `bounds`: by class, how many."""

    def __init__(self, bounds: Mapping[Priority, int]) -> None:
        self.bounds = bounds
        self._open = dict.fromkeys(Priority, 0)
        self._nobody = asyncio.Event()
        self._last_end_s: float | None = None
        self._interval_s = 0.0
        self._drain_until_s: float | None = None
        self._shed_from: Priority | None = None
        self._halvings = 0

    @property
    def open_requests(self) -> int:
        return sum(self._open.values())

    def open_of(self, priority: Priority) -> int:
        return self._open[priority]

    async def emptied(self) -> None:
        """Wait until no request is open."""
        while self.open_requests:
            self._nobody.clear()
            await self._nobody.wait()

    @property
    def draining(self) -> bool:
        return self._drain_until_s is not None

    def enter(self, now_s: float, priority: Priority = Priority.NORMAL) -> None:
        """Count a request in, or raise why it may not enter. A caller that enters must leave."""
        error = refusal(self._load(now_s, priority))
        if error is not None:
            raise error
        self._open[priority] += 1

    def leave(self, now_s: float, priority: Priority = Priority.NORMAL) -> None:
        self._open[priority] -= 1
        assert self._open[priority] >= 0, "a request left twice"
        if self._last_end_s is not None:
            sample_s = now_s - self._last_end_s
            self._interval_s = (
                _DECAY * self._interval_s + (1 - _DECAY) * sample_s
                if self._interval_s
                else sample_s
            )
        self._last_end_s = now_s
        if not self.open_requests:
            self._nobody.set()

    def drain(self, until_s: float) -> None:
        self._drain_until_s = until_s

    def narrow(self, shed_from: Priority | None, halvings: int) -> None:
        """Refuse classes from `shed_from` down, and let in 1 / 2**halvings of the rest."""
        self._shed_from, self._halvings = shed_from, halvings

    def _load(self, now_s: float, priority: Priority) -> Load:
        return Load(
            open_requests=self._open[priority],
            max_queue=self.bounds[priority] >> self._halvings or min(1, self.bounds[priority]),
            name=priority.name.lower(),
            shed=self._shed_from is not None and priority >= self._shed_from,
            draining=self.draining,
            drain_left_s=(self._drain_until_s or now_s) - now_s,
            finish_interval_s=self._interval_s,
        )


def class_bounds(max_queue: int, class_queue: Sequence[str]) -> dict[Priority, int]:
    """`low=64` bounds one class; the others have `max_queue`."""
    given = dict(item.split("=") for item in class_queue)
    return {p: int(given.get(p.name.lower(), max_queue)) for p in Priority}
