"""When the worker collects garbage."""

from __future__ import annotations

import gc

COLLECT_EVERY_STEPS = 1024


class Collector:
    """Garbage collection where nobody waits for it. The interpreter's own is off: it would pause
    a step whenever its counters say so, and walk the model's objects each time."""

    def __init__(self) -> None:
        self._steps = 0
        gc.disable()

    def loaded(self) -> None:
        """What a load leaves is there to stay: never look at it again."""
        gc.collect()
        gc.freeze()

    def unloaded(self) -> None:
        """Let go of what an unloaded model held in cycles."""
        gc.unfreeze()
        self.loaded()

    def stepped(self) -> None:
        """Bounds what cycles can hold under a load that never pauses."""
        self._steps += 1
        if self._steps % COLLECT_EVERY_STEPS == 0:
            gc.collect(1)

    def idle(self) -> None:
        if self._steps:
            self._steps = 0
            gc.collect()


class NoCollector(Collector):
    """For a loop in somebody else's process, whose garbage is not ours to time."""

    def __init__(self) -> None:
        pass

    def loaded(self) -> None:
        pass

    def unloaded(self) -> None:
        pass

    def stepped(self) -> None:
        pass

    def idle(self) -> None:
        pass
