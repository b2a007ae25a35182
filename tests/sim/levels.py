"""An overloaded server, simulated: requests of four classes queue for rows, service levels are watched
and remedies applied, under a virtual clock."""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mlx_serving.catalog.relief import IDLE_S
from mlx_serving.telemetry.events import RequestFinished
from mlx_serving.traffic.ceilings import Wishes, tuning
from mlx_serving.traffic.levels import TICK_S, LevelChanged, Levels
from mlx_serving.traffic.remedies import Remedy
from mlx_serving.traffic.slo import Objective, parse
from mlx_serving.traffic.step_guard import Enabled
from mlx_serving.types import Priority, Usage
from model_infos import model_info

SERVICE_S = 2.0
"""Mean time that a request holds a row."""
TOKENS = 40


@dataclass
class Server:
    """`usual` requests at once of `rows` at most, first come first served; `Levels` says whom to refuse,
    and how many of them.

    `knee`: from so many on, they share what there is. `stall_s`: what others' prompts cost each token at
    a time, computed in whole chunks."""

    rows: int = 8
    usual: int = 8
    knee: int = 8
    stall_s: Callable[[float], float] = lambda _: 0.0
    classes: bool = False
    """The higher class goes first; otherwise all are served as they come."""
    favoured: Sequence[Objective] = ()
    chunk_halvings: int = 0
    ceiling_steps: int = 0
    max_open: int = 64
    shed_from: Priority | None = None
    halvings: int = 0
    idle_holds: int = 0
    """Rows' worth of memory that another model holds, which somebody asks for every `idle_asked_s`."""
    idle_asked_s: float = math.inf
    idle_in_memory: bool = True
    idle_since_s: float = 0.0
    kept_out: int = 0
    canary_slow: float = 1.0
    """Factor on the service time of a tenth of the requests, until it is rolled back."""
    now_s: float = 0.0
    refused: int = 0
    waiting: deque[tuple[float, Priority]] = field(default_factory=deque)
    running: list[tuple[float, float, float, Priority]] = field(default_factory=list)

    def narrow(self, shed_from: Priority | None, halvings: int) -> None:
        self.shed_from, self.halvings = shed_from, halvings

    def tune(self, chunk_halvings: int, ceiling_steps: int) -> None:
        self.chunk_halvings, self.ceiling_steps = chunk_halvings, ceiling_steps
        self.ceiling = self._ceiling()

    def __post_init__(self) -> None:
        self.ceiling = self._ceiling()

    def _ceiling(self) -> int:
        info = model_info(max_num_seqs=self.rows)
        wishes = Wishes(None, self.usual, self.chunk_halvings, self.ceiling_steps)
        return tuning(info, wishes, Enabled()).max_num_seqs or self.rows

    @property
    def room(self) -> int:
        """Rows that there is memory for."""
        return self.rows - self.idle_holds * self.idle_in_memory

    def keep_out(self, models: int) -> None:
        if models != self.kept_out:
            self.idle_in_memory = models < self.kept_out
        self.kept_out = models

    def can(self, remedy: Remedy) -> bool:
        match remedy:
            case "evict_idle":
                lacks = bool(self.waiting) and self.room <= len(self.running) < self.ceiling
                long_idle = self.now_s - self.idle_since_s >= IDLE_S
                return lacks and self.idle_in_memory and long_idle
            case "roll_back":
                return self.canary_slow > 1.0
            case _:
                return True

    def favour(self, objectives: Sequence[Objective]) -> None:
        self.favoured = objectives

    def _class(self, waiting: tuple[float, Priority]) -> int:
        """Those of one class in the order of their arrival."""
        priority = waiting[1]
        return priority - sum(o.about("m", priority, None) for o in self.favoured)

    def roll_back(self) -> None:
        self.canary_slow = 1.0

    def arrive(self, priority: Priority) -> None:
        is_full = len(self.waiting) + len(self.running) >= self.max_open >> self.halvings
        if is_full or (self.shed_from is not None and priority >= self.shed_from):
            self.refused += 1
        else:
            self.waiting.append((self.now_s, priority))

    def start(self, rng: random.Random) -> None:
        if self.now_s - self.idle_since_s >= self.idle_asked_s:
            self.idle_in_memory, self.idle_since_s = True, self.now_s
        while self.waiting and len(self.running) < min(self.ceiling, self.room):
            first = min(self.waiting, key=self._class) if self.classes else self.waiting[0]
            self.waiting.remove(first)
            arrived_s, priority = first
            slow = self.canary_slow if rng.random() < 0.1 else 1.0
            slow *= max(1.0, (len(self.running) + 1) / self.knee)
            begins_s = self.now_s + 0.05 * slow * (1 + 0.2 * self.chunk_halvings)
            ends_s = begins_s + rng.gammavariate(4, SERVICE_S / 4) * slow
            ends_s += TOKENS * self.stall_s(self.now_s) / 2**self.chunk_halvings
            heapq.heappush(self.running, (ends_s, arrived_s, begins_s, priority))


def simulate(
    seed: int,
    slo: str | Sequence[str],
    ladder: Sequence[Remedy],
    load: Callable[[float], float],
    *,
    until_s: float = 1800.0,
    canary_slow: float = 1.0,
    dry_run: bool = False,
    server: Server | None = None,
) -> tuple[list[tuple[float, LevelChanged]], Server, Levels]:
    """`load` gives the offered load at a time, as a share of what the usual rows can serve."""
    rng, server = random.Random(seed), server or Server(canary_slow=canary_slow)
    changes: list[tuple[float, LevelChanged]] = []
    levels = Levels(
        [parse(text) for text in ([slo] if isinstance(slo, str) else slo)],
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
            rows = min(server.usual, server.knee)
            rate = max(1e-6, load(server.now_s) * rows / SERVICE_S)
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
        usage=Usage(prompt_tokens=10, completion_tokens=TOKENS),
        ttft_ms=1e3 * (begins_s - arrived_s),
        tpot_ms=1e3 * (ends_s - begins_s) / TOKENS,
        duration_ms=1e3 * (ends_s - arrived_s),
        priority=priority,
    )
