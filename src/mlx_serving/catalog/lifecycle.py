"""Where each served model stands, from its files to readiness.

States are a tagged union; `ModelSlot` moves one model through them and lets requests wait for it.
What fetching and loading mean is given by the engine (files, worker, text side), so that this
stays a state machine.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar, assert_never

from mlx_serving.errors import MLXServingError, ModelBroken

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Absent:
    """Known by name only."""


@dataclass(frozen=True, slots=True)
class Fetching:
    """Files are being downloaded or converted."""

    detail: str = ""


@dataclass(frozen=True, slots=True)
class Loading:
    """The worker is loading it."""


@dataclass(frozen=True, slots=True)
class Ready(Generic[T]):
    loaded: T


@dataclass(frozen=True, slots=True)
class Failed:
    error: MLXServingError


State = Absent | Fetching | Loading | Ready[T] | Failed


def status_of(state: State[T]) -> tuple[str, str | None]:
    """The word and the reason that /health and /v1/models show."""
    match state:
        case Absent():
            return "absent", None
        case Fetching(detail):
            return "fetching", detail or None
        case Loading():
            return "loading", None
        case Ready():
            return "ready", None
        case Failed(error):
            return "failed", error.message
        case _:
            assert_never(state)


Steps = Callable[["ModelSlot[T]"], Awaitable[T]]
"""Fetches and loads one model, reporting phases through `slot.enter`; raises what went wrong."""


@dataclass(slots=True)
class ModelSlot(Generic[T]):
    """One served model: its names, its state, and the single task that brings it up.

    Concurrent requests share one load; a load that failed is tried again by the next request
    that asks for it, at most every `RETRY_AFTER_S`.
    """

    RETRY_AFTER_S = 10.0

    source: str
    model_id: str
    aliases: tuple[str, ...]
    steps: Steps[T]
    created: int = field(default_factory=lambda: int(time.time()))
    state: State[T] = field(default_factory=Absent)
    _task: asyncio.Task[None] | None = None
    _failed_at: float = 0.0

    def enter(self, state: Fetching | Loading) -> None:
        self.state = state

    def answers_to(self, name: str) -> bool:
        return name == self.model_id or name in self.aliases

    def start(self) -> asyncio.Task[None]:
        """Begin bringing it up, or join the attempt that is under way."""
        if self._task is None or self._task.done():
            self.state = Loading()
            self._task = asyncio.create_task(self._bring_up(), name=f"load {self.model_id}")
        return self._task

    async def ready(self) -> T:
        """The loaded model; waits for a load under way. Raises what the load raised."""
        match self.state:
            case Ready(loaded):
                return loaded
            case Failed(error) if time.monotonic() - self._failed_at < self.RETRY_AFTER_S:
                raise error
            case _:
                await asyncio.shield(self.start())
        match self.state:
            case Ready(loaded):
                return loaded
            case Failed(error):
                raise error
            case _:
                raise ModelBroken(f"Model '{self.model_id}' was unloaded while it was loading.")

    def forgive(self) -> None:
        """Try again at the next request, however recent the failure."""
        self._failed_at = -math.inf

    async def close(self) -> None:
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self.state = Absent()

    async def _bring_up(self) -> None:
        try:
            self.state = Ready(await self.steps(self))
        except MLXServingError as error:
            self._fail(error)
        except Exception as error:
            log.exception("loading %s failed", self.model_id)
            self._fail(ModelBroken(f"Model '{self.model_id}' could not be loaded: {error}"))

    def _fail(self, error: MLXServingError) -> None:
        self._failed_at = time.monotonic()
        self.state = Failed(error)
