"""An overloaded server, simulated: requests of four classes queue for rows, service levels are watched
and remedies applied, under a virtual clock."""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mlx_serving.telemetry.events import RequestFinished
from mlx_serving.traffic.levels import TICK_S, LevelChanged, Levels
from mlx_serving.traffic.remedies import Remedy
from mlx_serving.traffic.slo import parse
from mlx_serving.types import Priority, Usage

SERVICE_S = 2.0
"""Mean time that a request holds a row."""


@dataclass
class Server:
    """`rows` requests at once, first come first served; `Levels` says whom to refuse."""

    rows: int = 8
    max_open: int = 64
    shed_from: Priority | None = None
    halvings: int = 0
    canary_slow: float = 1.0
    """Factor on the service time of a tenth of the requests, until it is rolled back."""
    now_s: float = 0.0
    refused: int = 0
    waiting: deque[tuple[float, Priority]] = field(default_factory=deque)
    running: list[tuple[float, float, float, Priority]] = field(default_factory=list)

    def narrow(self, shed_from: Priority | None, halvings: int) -> None:
        self.shed_from, self.halvings = shed_from, halvings

    def roll_back(self) -> None:
        self.canary_slow = 1.0

    def arrive(self, priority: Priority) -> None:
        is_full = len(self.waiting) + len(self.running) >= self.max_open >> self.halvings
        if is_full or (self.shed_from is not None and priority >= self.shed_from):
            self.refused += 1
        else:
            self.waiting.append((self.now_s, priority))

    def start(self, rng: random.Random) -> None:
        while self.waiting and len(self.running) < self.rows:
            arrived_s, priority = self.waiting.popleft()
            slow = self.canary_slow if rng.random() < 0.1 else 1.0
            begins_s = self.now_s + 0.05 * slow
            ends_s = begins_s + rng.gammavariate(4, SERVICE_S / 4) * slow
            heapq.heappush(self.running, (ends_s, arrived_s, begins_s, priority))


def simulate(
    seed: int,
    slo: str,
    ladder: Sequence[Remedy],
    load: Callable[[float], float],
    *,
    until_s: float = 1800.0,
    canary_slow: float = 1.0,
    dry_run: bool = False,
) -> tuple[list[tuple[float, LevelChanged]], Server, Levels]:
    """`load` gives the offered load at a time, as a share of what the rows can serve."""
    rng, server = random.Random(seed), Server(canary_slow=canary_slow)
    changes: list[tuple[float, LevelChanged]] = []
    levels = Levels(
        [parse(slo)],
        server,
        ladder=ladder,
        dry_run=dry_run,
        on_change=lambda change: changes.append((server.now_s, change)),
        now=lambda: server.now_s,
    )
    next_tick_s, next_arrival_s = TICK_S, 0.0
    while server.now_s < until_s:
        ends_s = server.running[0][0] if server.running else until_s
        server.now_s = min(next_tick_s, next_arrival_s, ends_s)
        if server.now_s == ends_s and server.running:
            levels.observe(_finished(heapq.heappop(server.running)))
        elif server.now_s == next_arrival_s:
            server.arrive(rng.choice(list(Priority)))
            rate = max(1e-6, load(server.now_s) * server.rows / SERVICE_S)
            next_arrival_s += rng.expovariate(rate)
        else:
            levels.tick()
            next_tick_s += TICK_S
        server.start(rng)
    return changes, server, levels


def _finished(row: tuple[float, float, float, Priority]) -> RequestFinished:
    ends_s, arrived_s, begins_s, priority = row
    return RequestFinished(
        request_id="r",
        model_id="m",
        outcome="stop",
        usage=Usage(prompt_tokens=10, completion_tokens=40),
        ttft_ms=1e3 * (begins_s - arrived_s),
        tpot_ms=1e3 * (ends_s - begins_s) / 40,
        duration_ms=1e3 * (ends_s - arrived_s),
        priority=priority,
    )
