"""The one interface through which the gateway reaches a model, wherever its loop runs.

`supervisor.Supervisor` runs it in a child process, `inprocess.InProcessWorker` in a thread
of this one. Everything here is called on one event loop's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import msgspec

from mlx_serving.errors import MLXServingError
from mlx_serving.types import (
    NO_TURN,
    CacheStats,
    Grammar,
    ModelInfo,
    Priority,
    SamplingParams,
    Turn,
)
from mlx_serving.worker.client import SequenceStream
from mlx_serving.worker.watchdog import Deadlines
from mlx_serving.worker.wire import Memory, ModelOptions, Order, StepStats, Wired


class Starting(msgspec.Struct, frozen=True, tag="starting"):
    """The process is there, but has not said hello."""

    pid: int | None = None


class Loading(msgspec.Struct, frozen=True, tag="loading"):
    """It lives and is loading models; submissions wait behind the load."""

    pid: int
    models: tuple[str, ...]


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    pid: int


class Restarting(msgspec.Struct, frozen=True, tag="restarting"):
    """It died; the next one starts in `in_s` seconds (counted from when the state began)."""

    attempt: int
    in_s: float
    cause: str


class CircuitOpen(msgspec.Struct, frozen=True, tag="open"):
    """It keeps dying: nobody is let in, and no worker started, until then (by the supervisor's
    clock). Streams that had begun wait."""

    until_s: float
    cause: str


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """It is not started again until `start()` is called anew."""

    cause: str


class Stopped(msgspec.Struct, frozen=True, tag="stopped"):
    pass


WorkerState = Starting | Loading | Ready | Restarting | CircuitOpen | Failed | Stopped


class WorkerHealth(msgspec.Struct, frozen=True, kw_only=True):
    """One worker in `/health`."""

    pid: int | None
    state: str
    phase: str
    """What the worker itself said last: idle, loading, compiling, stepping; "" before it speaks."""
    models: tuple[str, ...]
    cause: str | None = None
    """Why the last worker ended, while there is no next one."""
    restarts: int = 0
    breaker: str = "closed"
    """closed, open (a crash loop: new requests are refused) or half_open (it is being tried)."""
    retry_in_s: float | None = None
    """While open: until the next trial."""
    broken: dict[str, str] = {}
    """Models that cannot be served at present, and why; the quarantined ones among them."""
    streams_waiting: int = 0
    """Streams that wait for a worker."""


class WorkerStarted(msgspec.Struct, frozen=True, tag="worker_started"):
    """The process said hello. `restarts` is 0 for the first."""

    pid: int
    restarts: int


class WorkerExited(msgspec.Struct, frozen=True, tag="worker_exited"):
    pid: int
    cause: str
    next: Restarting | CircuitOpen | Failed | Stopped


class ModelReady(msgspec.Struct, frozen=True, tag="model_ready"):
    info: ModelInfo


class ModelLoadFailed(msgspec.Struct, frozen=True, tag="model_load_failed"):
    model_id: str
    code: str
    message: str


class ModelGone(msgspec.Struct, frozen=True, tag="model_gone"):
    model_id: str


class PhaseChanged(msgspec.Struct, frozen=True, tag="phase_changed"):
    """Also sent again, with growing `elapsed_s`, while a load lasts."""

    phase: str
    detail: str
    elapsed_s: float


class MemoryShort(msgspec.Struct, frozen=True, tag="memory_short"):
    """See `wire.Short`."""

    bytes: int


class MemoryUse(msgspec.Struct, frozen=True, tag="memory_use"):
    memory: Memory


WorkerEvent = (
    WorkerStarted
    | WorkerExited
    | ModelReady
    | ModelLoadFailed
    | ModelGone
    | PhaseChanged
    | MemoryUse
    | MemoryShort
)


def ignore(_: object) -> None:
    """The callback of who does not listen."""


class WorkerClient(Protocol):
    """What gateway and engine know of a worker."""

    on_event: Callable[[WorkerEvent], None]
    """Must not raise, nor must `on_stats`."""
    on_stats: Callable[[StepStats], None]
    """Called once a step, before the step's rows are handed to their streams."""

    def start(self) -> None:
        """Begin, and return at once; `state` tells how far it is. Needs a running event loop."""
        ...

    async def stop(self, deadline_s: float = 5.0) -> None:
        """End the worker and every stream (`errors.Draining`). When this returns, nothing of it
        is left: what has not gone by the deadline was killed."""
        ...

    def restart(self) -> None:
        """Replace the worker without losing a stream, and forget what was held against models.
        Does nothing where there is no supervisor."""
        ...

    async def load_model(
        self, model_id: str, path: str, options: ModelOptions | None = None
    ) -> ModelInfo:
        """Load, or return what is already loaded by that id.

        A load that its worker did not survive is tried again in the next one. Raises ModelBroken
        (or what the worker's code says; also when the model is quarantined), WorkerDied when
        there is no next one, Overloaded when there is no worker within the wait.
        """
        ...

    async def unload_model(self, model_id: str) -> None:
        """Its running sequences end with ModelNotFound. Unknown ids are not an error."""
        ...

    def order(self, order: Order) -> None:
        """How a model is run, from its next step on and in every later worker; it need not be loaded."""
        ...

    def bound(self, deadlines: Deadlines, resume_timeout_s: float, rss_limit_bytes: int) -> None:
        """When a worker is taken for stuck, how long streams wait for the next one, and what its resident
        set may grow to (0: no limit), from now on."""
        ...

    async def clear_cache(self, model_id: str) -> CacheStats:
        """Forget every prefix that no running sequence uses, in memory and on disk; returns what is
        left. Does nothing while the model is not loaded. Raises what ends the worker meanwhile."""
        ...

    def submit(
        self,
        model_id: str,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        prompt_len: int | None = None,
        priority: Priority = Priority.NORMAL,
        grammar: Grammar | None = None,
        cache_salt: str | None = None,
        pooled: bool = False,
        second_at: int | None = None,
        turn: Turn = NO_TURN,
    ) -> SequenceStream:
        """Start a sequence. Tokens past `prompt_len` are output that an earlier stream delivered.
        One that is `pooled` ends with its prompt, in one row that has its vector; `second_at` says
        where the second text of a pair begins.

        While the worker (re)starts, the stream waits for it, a bounded time; when the worker dies,
        it goes on in the next one. Raises Overloaded (with `retry_after_s`) when it cannot wait,
        ModelBroken for a quarantined model, Draining once stopped; whatever happens later is
        raised from the stream.
        """
        ...

    @property
    def state(self) -> WorkerState: ...

    @property
    def models(self) -> tuple[ModelInfo, ...]:
        """Loaded now."""
        ...

    @property
    def wired(self) -> Mapping[str, Wired]:
        """What became of the pinned ones' weights."""
        ...

    @property
    def broken(self) -> Mapping[str, MLXServingError]:
        """Models that were loaded once and cannot be served at present, and why."""
        ...

    def health(self) -> list[WorkerHealth]: ...
