"""Prepares for the model that is likely next, while another one answers.

`succession` guesses; this obeys, one model at a time, and counts whether it was right. The model is
loaded where the budget has room, or gets it from idle models other than the present one; otherwise
its files are read into the page cache.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from mlx_serving.catalog.lifecycle import Absent, AnySlot
from mlx_serving.catalog.residency import Residency
from mlx_serving.catalog.succession import Succession
from mlx_serving.telemetry.events import Event, ModelLoaded, ModelLoading, RequestStarted

log = logging.getLogger(__name__)

PIECE_BYTES = 1 << 20
"""Read at once: between pieces it can be told to stop."""

Outcome = Literal["begun", "hit", "miss"]
"""`hit`: a model is asked for that was prepared; `miss`: one is loaded that was not, though its files
were known."""


class Prefetch:
    """Listens to the engine's events. `threshold`: the confidence from which a guess is obeyed."""

    def __init__(
        self,
        slots: Mapping[str, AnySlot],
        residency: Residency,
        threshold: float,
        count: Callable[[Outcome], None],
    ) -> None:
        self.threshold = threshold
        self._slots = slots
        self._residency = residency
        self._count = count
        self._succession = Succession()
        self._folders: dict[str, Path] = {}
        """Of models that were loaded before."""
        self._ahead: set[str] = set()
        """Prepared, and not asked for since."""
        self._coming: str | None = None
        """What is being loaded without having been asked for."""
        self._present = ""
        """The model of the last request."""
        self._task: asyncio.Task[None] | None = None
        self._stopped = threading.Event()

    def hear(self, event: Event) -> None:
        match event:
            case ModelLoading(model_id=model_id):
                if model_id != self._coming and model_id in self._folders:
                    self._asked(model_id, "miss")
            case ModelLoaded(model_id=model_id, info=info):
                self._folders[model_id] = Path(info.path)
            case RequestStarted(model_id=model_id):
                self._asked(model_id, None)
                self._succession.observe(model_id)
                self._present = model_id
                self._consider()
            case _:
                pass

    async def close(self) -> None:
        self._stopped.set()
        if self._task is not None:
            await self._task

    def _asked(self, model_id: str, otherwise: Outcome | None) -> None:
        outcome: Outcome | None = "hit" if model_id in self._ahead else otherwise
        self._ahead.discard(model_id)
        if outcome is not None:
            self._count(outcome)

    def _consider(self) -> None:
        may = self.threshold and not self._stopped.is_set()
        guess = self._succession.guess() if may else None
        if guess is None or guess.confidence < self.threshold or guess.model_id in self._ahead:
            return
        slot, folder = self._slots[guess.model_id], self._folders.get(guess.model_id)
        free = self._task is None or self._task.done()
        if folder is None or not isinstance(slot.state, Absent) or not free:
            return
        self._ahead.add(guess.model_id)
        self._count("begun")
        log.info("%s is likely next (%.2f)", guess.model_id, guess.confidence)
        self._task = asyncio.create_task(self._prepare(slot, folder, self._present))
        # Requests that came meanwhile may have another model next.
        self._task.add_done_callback(lambda _: self._consider())

    async def _prepare(self, slot: AnySlot, folder: Path, present: str) -> None:
        if await self._residency.clear_for(slot, present) and not self._stopped.is_set():
            self._coming = slot.model_id
            await asyncio.wait([slot.start(asked=False)])
            self._coming = None
        if isinstance(slot.state, Absent):
            await asyncio.to_thread(read_ahead, folder, self._stopped)


def read_ahead(folder: Path, stopped: threading.Event) -> int:
    """Have the system read a folder's weights; returns how many bytes it has read. A file that cannot be
    read is left to the load, which says why.

    Linux takes advice (POSIX_FADV_WILLNEED), but heeds no more of it at once than its own read-ahead.
    """
    total = 0
    piece = bytearray(PIECE_BYTES)
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb", buffering=0) as file:
                while not stopped.is_set() and (count := file.readinto(piece)):
                    total += count
        except OSError as error:
            log.info("cannot read ahead: %s", error)
    return total
