"""What happens in an engine, as typed events: to hooks (called in place) and to async iterators.

An iterator that does not keep up loses its oldest events, and the loss is counted; a hook that
raises is logged and does not disturb what it observes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Literal, TypeVar

import msgspec

from mlx_serving.types import ModelInfo, Priority, Usage

log = logging.getLogger(__name__)

MAX_QUEUED_EVENTS = 1024


class WorkerStarted(msgspec.Struct, frozen=True, kw_only=True, tag="worker_started"):
    pid: int
    restarts: int


class WorkerDied(msgspec.Struct, frozen=True, kw_only=True, tag="worker_died"):
    pid: int | None
    cause: str


class ModelLoading(msgspec.Struct, frozen=True, kw_only=True, tag="model_loading"):
    model_id: str


class ModelLoaded(msgspec.Struct, frozen=True, kw_only=True, tag="model_loaded"):
    model_id: str
    info: ModelInfo


class ModelUnloaded(msgspec.Struct, frozen=True, kw_only=True, tag="model_unloaded"):
    model_id: str


class ModelFailed(msgspec.Struct, frozen=True, kw_only=True, tag="model_failed"):
    model_id: str
    code: str
    message: str


class RequestStarted(msgspec.Struct, frozen=True, kw_only=True, tag="request_started"):
    request_id: str
    model_id: str
    prompt_tokens: int


class Met(msgspec.Struct, frozen=True):
    """What a request met in its worker during a part of its time."""

    others_ms: float
    """That the device spent on other models."""
    sequences: float
    """Of its own model, itself included: the mean over the model's steps."""


class Company(msgspec.Struct, frozen=True):
    first: Met
    """Up to the first token."""
    after: Met


class RequestFinished(msgspec.Struct, frozen=True, kw_only=True, tag="request_finished"):
    request_id: str
    model_id: str
    outcome: str
    """A finish reason, or an error's code."""
    usage: Usage
    ttft_ms: float | None
    duration_ms: float
    tpot_ms: float | None = None
    """Mean time per output token after the first; None: there was one at most."""
    queue_ms: float | None = None
    """From its arrival until it was begun; None: it was not, or it is for vectors."""
    priority: Priority = Priority.NORMAL
    client: str | None = None
    """The name of the API key that it came with."""
    reused: Literal["hit", "shared", "miss"] | None = None
    """hit, shared: the answer was computed for another request."""
    empty: bool = False
    """The answer has neither text nor a call."""
    malformed: bool = False
    """Something in it began like a tool call and was not one."""
    broken_off: bool | None = None
    """Its schema or grammar had not come to its end when the answer did; None: it had none."""
    logprob: float | None = None
    """Mean log-probability of its tokens by the model that chose them; None: they were not asked for."""
    company: Company | None = None
    """What it met in its worker; None: it got no token."""
    shadow: bool = False
    """A copy for a rollout: nobody waited for its answer."""

    @property
    def complete(self) -> bool:
        """It got its whole answer."""
        return self.outcome in ("stop", "length", "tool_calls")

    @property
    def computed(self) -> bool:
        """For it, and not for another request."""
        return self.reused in (None, "miss")


Event = (
    WorkerStarted
    | WorkerDied
    | ModelLoading
    | ModelLoaded
    | ModelUnloaded
    | ModelFailed
    | RequestStarted
    | RequestFinished
)
Hook = Callable[[Event], None]
_E = TypeVar("_E", bound=Event)


class EventBus:
    """Publishes on one event loop's thread; cheap when nobody listens."""

    def __init__(self, on_drop: Callable[[], None] = lambda: None) -> None:
        self._hooks: list[Hook] = []
        self._queues: list[asyncio.Queue[Event]] = []
        self._on_drop = on_drop

    def publish(self, event: Event) -> None:
        for hook in tuple(self._hooks):
            try:
                hook(event)
            except Exception:
                log.exception("event hook %r failed on %s", hook, type(event).__name__)
        for queue in self._queues:
            if queue.full():
                queue.get_nowait()
                self._on_drop()
            queue.put_nowait(event)

    def add_hook(
        self, hook: Callable[[_E], None], kind: type[_E] | None = None
    ) -> Callable[[], None]:
        """Call `hook` with each event (of one type, if `kind` is given). Returns what removes it."""

        def filtered(event: Event) -> None:
            if kind is None or isinstance(event, kind):
                hook(event)  # type: ignore[arg-type]

        self._hooks.append(filtered)
        return lambda: self._hooks.remove(filtered)

    def subscribe(self) -> Subscription:
        """Every event from this call on, until the subscription is closed."""
        queue: asyncio.Queue[Event] = asyncio.Queue(MAX_QUEUED_EVENTS)
        self._queues.append(queue)
        return Subscription(queue, lambda: self._queues.remove(queue))


class Subscription:
    """An endless async iterator of events; `close()` it, or use it as a context manager."""

    def __init__(self, queue: asyncio.Queue[Event], detach: Callable[[], None]) -> None:
        self._queue = queue
        self._detach: Callable[[], None] | None = detach

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> Event:
        if self._detach is None:
            raise StopAsyncIteration
        return await self._queue.get()

    def close(self) -> None:
        if self._detach is not None:
            self._detach()
            self._detach = None

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
