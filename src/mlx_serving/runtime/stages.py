"""How long the parts of a sequence's way to its first token take, in the worker.

submit ─▶ hash ─▶ queue (in it: grammar, disk) ─▶ prefill ─▶ first token
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mlx_serving import clock
from mlx_serving.worker.wire import Stage, StageTime


class Stages:
    """A model's. What was measured waits for the next step's stats."""

    def __init__(self, now: clock.Clock) -> None:
        self._now = now
        self._waiting: dict[int, float] = {}
        """Since when, by sequence."""
        self._computing: dict[int, float] = {}
        self._compiling: dict[int, float] = {}
        self._measured: list[StageTime] = []

    @contextmanager
    def measure(self, stage: Stage) -> Iterator[None]:
        began_s = self._now()
        yield
        self.took(stage, began_s)

    def took(self, stage: Stage, since_s: float) -> None:
        self._measured.append((stage, (self._now() - since_s) * 1e3))

    def compiling(self, seq_id: int) -> None:
        """Its grammar is compiled while it queues."""
        self._compiling[seq_id] = self._now()

    def compiled(self, seq_id: int) -> None:
        since_s = self._compiling.pop(seq_id, None)
        if since_s is not None:
            self.took("grammar", since_s)

    def queued(self, seq_id: int) -> None:
        self._waiting[seq_id] = self._now()

    def started(self, seq_id: int, disk_since_s: float | None) -> None:
        """It has a row, the first time or again. `disk_since_s`: from then on it could have had one, but
        for what was on its way from disk."""
        since_s = self._waiting.pop(seq_id, None)
        if since_s is None:
            return
        self._computing[seq_id] = self._now()
        self.took("queue", since_s)
        if disk_since_s is not None:
            self.took("disk", disk_since_s)

    def first_token(self, seq_id: int) -> None:
        """Any token: only the first one counts."""
        since_s = self._computing.pop(seq_id, None)
        if since_s is not None:
            self.took("prefill", since_s)

    def forget(self, seq_id: int) -> None:
        self._compiling.pop(seq_id, None)
        self._waiting.pop(seq_id, None)
        self._computing.pop(seq_id, None)

    def take(self) -> list[StageTime]:
        """What was measured since the last time."""
        measured, self._measured = self._measured, []
        return measured
