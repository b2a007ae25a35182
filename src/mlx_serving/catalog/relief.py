"""Memory that idle models give up while requests of others are not served as promised: a remedy.

A model that comes makes others leave by itself, and so does a sequence that fits no more though nothing
runs (`residency`). Short of that, sequences wait for those that run, beside weights that nobody uses.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence

from mlx_serving.catalog.lifecycle import AnySlot, Ready
from mlx_serving.worker.wire import StepStats

log = logging.getLogger(__name__)

IDLE_S = 60.0
"""So long nobody has used a model that leaves: one in use now and then stays."""
LACKING_S = 10.0
"""So long it is remembered that sequences waited for memory."""


class Relief:
    """Args: slots: the models, without their adapters."""

    def __init__(
        self,
        slots: Sequence[AnySlot],
        *,
        idle_s: float = IDLE_S,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.idle_s = idle_s
        self._slots = slots
        self._now = now
        self._lacked_s = -math.inf
        self._out: list[AnySlot] = []

    def observe(self, stats: StepStats) -> None:
        """Called for each step."""
        if stats.lacks_memory:
            self._lacked_s = self._now()

    @property
    def possible(self) -> bool:
        """Sequences wait for memory, and a model that nobody uses holds some."""
        return self._now() - self._lacked_s <= LACKING_S and bool(self._idle())

    def keep_out(self, models: int) -> None:
        """Have so many out of memory, as far as there are idle ones; who is asked for comes back at once.
        Those beyond come back now, the last one first, where there is room."""
        for slot in self._idle()[: max(0, models - len(self._out))]:
            log.info("%s leaves memory: requests of other models wait for it", slot.model_id)
            slot.unload()
            self._out.append(slot)
        while len(self._out) > models:
            self._out.pop().start(asked=False)

    def _idle(self) -> list[AnySlot]:
        """The least recently used first."""
        idle = [slot for slot in self._slots if self._is_idle(slot)]
        return sorted(idle, key=lambda slot: slot.used_s)

    def _is_idle(self, slot: AnySlot) -> bool:
        in_use = slot.busy or slot.stays or self._now() - slot.used_s < self.idle_s
        return isinstance(slot.state, Ready) and not in_use
