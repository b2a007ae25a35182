"""Reads the files of the model that is likely next into the page cache, while another one answers.

`succession` guesses; this obeys, one model at a time, and counts whether it was right.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from mlx_serving.catalog.lifecycle import Absent, AnySlot
from mlx_serving.catalog.succession import Succession
from mlx_serving.telemetry.events import Event, ModelLoaded, ModelLoading, RequestStarted

log = logging.getLogger(__name__)

PIECE_BYTES = 32 << 20
"""Asked for at once: between pieces it can be told to stop."""

Outcome = Literal["begun", "hit", "miss"]
"""`hit`: a model is loaded whose files were read ahead; `miss`: one whose files were not, though they
were known."""


class Prefetch:
    """Listens to the engine's events. `threshold`: the confidence from which a guess is obeyed."""

    def __init__(
        self,
        slots: Mapping[str, AnySlot],
        threshold: float,
        count: Callable[[Outcome], None],
    ) -> None:
        self._slots = slots
        self._threshold = threshold
        self._count = count
        self._succession = Succession()
        self._folders: dict[str, Path] = {}
        """Of models that were loaded before."""
        self._ahead: set[str] = set()
        """Read since they were loaded last."""
        self._reading: asyncio.Task[int] | None = None
        self._stopped = threading.Event()

    def hear(self, event: Event) -> None:
        match event:
            case ModelLoading(model_id=model_id) if model_id in self._folders:
                self._count("hit" if model_id in self._ahead else "miss")
                self._ahead.discard(model_id)
            case ModelLoaded(model_id=model_id, info=info):
                self._folders[model_id] = Path(info.path)
            case RequestStarted(model_id=model_id):
                self._succession.observe(model_id)
                self._consider()
            case _:
                pass

    async def close(self) -> None:
        self._stopped.set()
        if self._reading is not None:
            await self._reading

    def _consider(self) -> None:
        guess = self._succession.guess()
        if guess is None or guess.confidence < self._threshold or guess.model_id in self._ahead:
            return
        folder = self._folders.get(guess.model_id)
        absent = isinstance(self._slots[guess.model_id].state, Absent)
        if folder is None or not absent or not (self._reading is None or self._reading.done()):
            return
        self._ahead.add(guess.model_id)
        self._count("begun")
        log.info("%s is likely next (%.2f): reading ahead", guess.model_id, guess.confidence)
        self._reading = asyncio.create_task(asyncio.to_thread(read_ahead, folder, self._stopped))


def read_ahead(folder: Path, stopped: threading.Event) -> int:
    """Have the system read a folder's weights; returns how many bytes were asked for. A file that cannot
    be read is left to the load, which says why."""
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                for start in range(0, size, PIECE_BYTES):
                    if stopped.is_set():
                        return total
                    total += _ask(file.fileno(), start, min(PIECE_BYTES, size - start))
        except OSError as error:
            log.info("cannot read ahead: %s", error)
    return total


def _ask(fd: int, start: int, count: int) -> int:
    """Where the system takes no advice (macOS), by reading."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, start, count, os.POSIX_FADV_WILLNEED)
        return count
    return len(os.pread(fd, count, start))
