"""Where each served model stands, from its files to memory and out of it again.

    absent ─▶ fetching ─▶ loading ─▶ ready ─▶ draining ─▶ absent
                  └─────────┴──▶ failed ──(the next request, a while later)──▶ fetching

States are a tagged union and `after` is every transition. `ModelSlot` moves one model through
them and lets requests wait for it; what loading and unloading mean is given as `Hands`, and
`residency` decides who has to leave for whom.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar, assert_never

from mlx_serving.errors import MLXServingError, ModelBroken

log = logging.getLogger(__name__)

T = TypeVar("T")

FOREVER_S = -1.0
"""A `keep_alive_s` that keeps a model until its memory is needed."""


@dataclass(frozen=True, slots=True)
class Absent:
    """Known by name only; the next request brings it up."""


@dataclass(frozen=True, slots=True)
class Fetching:
    """Files are being downloaded or converted."""

    detail: str = ""


@dataclass(frozen=True, slots=True)
class Loading:
    """The worker is loading it, or it waits for memory."""

    detail: str = ""


@dataclass(frozen=True, slots=True)
class Ready(Generic[T]):
    loaded: T


@dataclass(frozen=True, slots=True)
class Draining(Generic[T]):
    """It leaves once the requests that use it have ended; who comes now waits for its return."""

    loaded: T


@dataclass(frozen=True, slots=True)
class Failed:
    error: MLXServingError


State = Absent | Fetching | Loading | Ready[T] | Draining[T] | Failed


@dataclass(frozen=True, slots=True)
class FetchBegan:
    detail: str = ""


@dataclass(frozen=True, slots=True)
class LoadBegan:
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Loaded(Generic[T]):
    loaded: T


@dataclass(frozen=True, slots=True)
class Broke:
    error: MLXServingError


@dataclass(frozen=True, slots=True)
class DrainBegan:
    pass


@dataclass(frozen=True, slots=True)
class Gone:
    """It is in no memory any more, or was never put there for want of room."""


Event = FetchBegan | LoadBegan | Loaded[T] | Broke | DrainBegan | Gone


def after(state: State[T], event: Event[T]) -> State[T]:
    """The state that follows. AssertionError: that cannot happen in this state."""
    match event:
        case FetchBegan(detail):
            assert isinstance(state, (Absent, Fetching, Failed)), (state, event)
            return Fetching(detail)
        case LoadBegan(detail):
            assert isinstance(state, (Absent, Fetching, Loading, Failed)), (state, event)
            return Loading(detail)
        case Loaded(loaded):
            assert isinstance(state, Loading), (state, event)
            return Ready(loaded)
        case Broke(error):
            assert not isinstance(state, (Ready, Draining)), (state, event)
            return Failed(error)
        case DrainBegan():
            assert isinstance(state, Ready), (state, event)
            return Draining(state.loaded)
        case Gone():
            return Absent()
        case _:
            assert_never(event)


def status_of(state: State[T]) -> tuple[str, str | None]:
    """The word and the reason that /health and /v1/models show."""
    match state:
        case Absent():
            return "absent", None
        case Fetching(detail):
            return "fetching", detail or None
        case Loading(detail):
            return "loading", detail or None
        case Ready():
            return "ready", None
        case Draining():
            return "draining", "it is unloaded once its running requests have ended"
        case Failed(error):
            return "failed", error.message
        case _:
            assert_never(state)


class NoRoom(Exception):
    """A model that nobody asked for yet does not fit beside those in memory: it stays absent."""


class Hands(Protocol[T]):
    """What brings a model up and takes it down."""

    async def bring_up(self, slot: ModelSlot[T], *, asked: bool) -> T:
        """Fetch and load, reporting phases through `slot.enter`; raises what went wrong, NoRoom
        only where nobody `asked`."""
        ...

    async def take_down(self, slot: ModelSlot[T]) -> None: ...


@dataclass(slots=True, eq=False)
class ModelSlot(Generic[T]):
    """One served model: its names, its state, who uses it, and the one task that moves it.

    Concurrent requests share one load; a load that failed is tried again by the next request
    that asks for it, at most every `RETRY_AFTER_S`.
    """

    RETRY_AFTER_S = 10.0

    source: str
    model_id: str
    aliases: tuple[str, ...]
    hands: Hands[T]
    keep_alive_s: float = FOREVER_S
    """How long it stays after its last request; below 0: until its memory is needed."""
    pinned: bool = False
    """It never leaves by itself."""
    base: ModelSlot[T] | None = None
    """The model beside whose weights this one runs, an adapter: whoever uses it uses that too, and when
    that leaves it has left."""
    adapters: list[ModelSlot[T]] = field(default_factory=list)
    """Those whose base it is."""
    created: int = field(default_factory=lambda: int(time.time()))
    state: State[T] = field(default_factory=Absent)
    users: int = 0
    """Requests that use it now; it stays while there are any."""
    waiters: int = 0
    """Requests that wait for it."""
    used_s: float = field(default_factory=time.monotonic)
    settled: bool = False
    """Its first attempt to load is over, or nobody will make one before a request does."""
    on_change: Callable[[], None] = lambda: None
    """Called when it changes its state, or somebody stops using it."""
    _task: asyncio.Task[None] | None = None
    _leaving: asyncio.Task[None] | None = None
    _unused: asyncio.Event = field(default_factory=asyncio.Event)
    _expiry: asyncio.Handle | None = None
    _expires_s: float = 0.0
    _kept_s: float | None = None
    """The last request's own wish, in place of `keep_alive_s`."""
    _failed_s: float = 0.0

    @property
    def busy(self) -> bool:
        """Somebody uses it, or waits for it."""
        return self.users + self.waiters > 0

    @property
    def stays(self) -> bool:
        """It is pinned, or an adapter of it is."""
        return self.pinned or any(adapter.pinned for adapter in self.adapters)

    @property
    def expires_in_s(self) -> float | None:
        """Until it leaves if nobody asks for it; None: it does not."""
        if self._expiry is None:
            return None
        return max(0.0, self._expires_s - time.monotonic())

    def enter(self, event: Event[T]) -> None:
        self.state = after(self.state, event)
        self.on_change()

    def answers_to(self, name: str) -> bool:
        return name == self.model_id or name in self.aliases

    # Using it

    async def acquire(self) -> T:
        """The loaded model, which stays until `release`. Raises what its load raised."""
        if self.base is None:
            return await self._acquire()
        await self.base.acquire()
        try:
            return await self._acquire()
        except BaseException:
            self.base.release()
            raise

    async def _acquire(self) -> T:
        self.waiters += 1
        try:
            while True:
                match self.state:
                    case Ready(loaded):
                        self.users += 1
                        self._stop_expiry()
                        return loaded
                    case Failed(error) if time.monotonic() - self._failed_s < self.RETRY_AFTER_S:
                        raise error
                    case Draining():
                        await asyncio.shield(self.unload())
                    case _:
                        await asyncio.shield(self.start())
        finally:
            self.waiters -= 1

    def release(self, keep_alive_s: float | None = None) -> None:
        """`keep_alive_s`: how long this request wants it kept; None: what is configured."""
        assert self.users > 0
        self.users -= 1
        self.used_s = time.monotonic()
        self._kept_s = keep_alive_s
        if not self.users:
            self._unused.set()
            self._watch_expiry()
        self.on_change()
        if self.base is not None:
            self.base.release(keep_alive_s)

    def hold(self) -> bool:
        """Be one more user, until `release`, of a model that is in memory; False: it is not, or is leaving
        with nobody to keep it."""
        if not (isinstance(self.state, Ready) or (isinstance(self.state, Draining) and self.users)):
            return False
        self.users += 1
        self._stop_expiry()
        return True

    @asynccontextmanager
    async def use(self) -> AsyncIterator[T]:
        """It stays in memory inside."""
        loaded = await self.acquire()
        try:
            yield loaded
        finally:
            self.release()

    async def ready(self) -> T:
        """Wait until it can be used; raises what its load raised."""
        async with self.use() as loaded:
            return loaded

    # Coming and going

    def start(self, *, asked: bool = True) -> asyncio.Task[None]:
        """Begin bringing it up, or join the attempt under way. Nobody `asked`: only if it fits."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._come(asked), name=f"load {self.model_id}")
        return self._task

    def unload(self) -> asyncio.Task[None]:
        """Have it leave once nobody uses it; joins a departure under way."""
        if self._leaving is None or self._leaving.done():
            self._leaving = asyncio.create_task(self._leave(), name=f"unload {self.model_id}")
        return self._leaving

    def forgive(self) -> None:
        """Try again at the next request, however recent the failure."""
        self._failed_s = -math.inf
        if self.base is not None:
            self.base.forgive()

    async def close(self) -> None:
        self._stop_expiry()
        tasks = [t for t in (self._task, self._leaving) if t is not None and not t.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.state = Absent()

    async def _come(self, asked: bool) -> None:
        if isinstance(self.state, (Ready, Draining)):
            return
        try:
            self.enter(Loaded(await self.hands.bring_up(self, asked=asked)))
            self.used_s = time.monotonic()
            self._watch_expiry()
        except NoRoom:
            self.enter(Gone())
        except MLXServingError as error:
            self._fail(error)
        except Exception as error:
            log.exception("loading %s failed", self.model_id)
            self._fail(ModelBroken(f"Model '{self.model_id}' could not be loaded: {error}"))
        finally:
            self.settled = True

    async def _leave(self) -> None:
        if self._task is not None and not self._task.done():
            await asyncio.shield(self._task)
        if not isinstance(self.state, Ready):
            return
        self._stop_expiry()
        self.enter(DrainBegan())
        while self.users:
            self._unused.clear()
            await self._unused.wait()
        # A worker that died meanwhile has let go of it too.
        with suppress(MLXServingError):
            await self.hands.take_down(self)
        self._kept_s = None
        self.enter(Gone())

    def _fail(self, error: MLXServingError) -> None:
        self._failed_s = time.monotonic()
        self.enter(Broke(error))

    # Time to live

    def _watch_expiry(self) -> None:
        self._stop_expiry()
        kept_s = self.keep_alive_s if self._kept_s is None else self._kept_s
        if kept_s >= 0 and not self.stays and not self.users:
            self._expires_s = time.monotonic() + kept_s
            self._expiry = asyncio.get_running_loop().call_later(kept_s, self._expire)

    def _stop_expiry(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None

    def _expire(self) -> None:
        self._expiry = None
        if isinstance(self.state, Ready) and not self.busy and not self.stays:
            self.unload()

    def pin(self, pinned: bool) -> None:
        self.pinned = pinned
        for slot in (self, self.base):
            if slot is not None and isinstance(slot.state, Ready):
                slot._watch_expiry()
        self.on_change()


AnySlot = ModelSlot[Any]
