"""Keeps one worker process alive, and every stream alive beyond it.

    starting ─▶ loading ─▶ ready ──death, restart()──▶ restarting ─▶ starting …   (stop: ─▶ stopped)
                                    └──crash loop──▶ open ─▶ starting (half-open: loads and probes)

One task (`_run`) walks these states; everything else reads them. Streams of a worker that died
are sent to the next one with the tokens that they have; what cannot be sent in the present state
waits in the backlog. One worker's time is a `life`; when to start, whom to blame, and what is stuck
are decided in `breaker`, `blame` and `watchdog`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
from collections.abc import Callable, Sequence

from mlx_serving import clock, errors
from mlx_serving.types import (
    NO_TURN,
    CacheStats,
    Grammar,
    ModelInfo,
    Priority,
    SamplingParams,
    Turn,
)
from mlx_serving.worker import port, reasons, reconcile, wire
from mlx_serving.worker.backlog import Backlog
from mlx_serving.worker.breaker import (
    Breaker,
    BreakerPolicy,
    Closed,
    HalfOpen,
    Open,
    after_death,
    after_probe,
    after_wait,
)
from mlx_serving.worker.client import Connection, SequenceStream
from mlx_serving.worker.growth import Growth
from mlx_serving.worker.life import Death, Life
from mlx_serving.worker.models import Models
from mlx_serving.worker.process import Process, WorkerProcess, ended
from mlx_serving.worker.watchdog import Deadlines

log = logging.getLogger(__name__)

MAX_PARKED = 4096


class Supervisor:
    """port.WorkerClient over a child process (or what else `spawn` starts).

    Args:
        policy: when to start the next worker.
        deadlines: when a worker is taken for stuck.
        max_deaths: of how many deaths in a row a sequence, or a model's load, may be a suspect.
        park_timeout_s: how long loads and new streams wait for a worker that is (re)starting.
        resume_timeout_s: how long streams of a worker that died wait for the next one.
        replace_timeout_s: how long a worker that is being replaced may take to finish its step.
        growth: when a worker is replaced for its size.
        revive: start another worker when one has died; otherwise streams end with WorkerDied.
        seed: of the back-off's jitter.
    """

    def __init__(
        self,
        *,
        policy: BreakerPolicy | None = None,
        deadlines: Deadlines | None = None,
        max_deaths: int = 3,
        park_timeout_s: float = 30.0,
        resume_timeout_s: float = 300.0,
        replace_timeout_s: float = 5.0,
        growth: Growth | None = None,
        revive: bool = True,
        seed: int | None = None,
        spawn: Callable[[], Process] = WorkerProcess,
        now: clock.Clock = clock.monotonic,
    ) -> None:
        self.on_event: Callable[[port.WorkerEvent], None] = port.ignore
        self.on_stats: Callable[[wire.StepStats], None] = port.ignore
        self._policy = policy or BreakerPolicy()
        self._deadlines = deadlines or Deadlines()
        self._park_timeout_s = park_timeout_s
        self._resume_timeout_s = resume_timeout_s
        self._replace_timeout_s = replace_timeout_s
        self._growth = growth or Growth()
        self._revive = revive
        self._random = random.Random(seed)
        self._spawn = spawn
        self._now = now
        self._state: port.WorkerState = port.Stopped()
        self._changed = asyncio.Event()
        self._run_task: asyncio.Task[None] | None = None
        self._life: Life | None = None
        """The present worker's; see `_usable`."""
        self._breaker: Breaker = Closed()
        self._hurry = asyncio.Event()
        """Start the next worker without waiting for the back-off."""
        self._models = Models(max_deaths)
        self._backlog = Backlog(self._expired, max_deaths)
        self._seq_ids = itertools.count(1)
        self._restarts = 0
        self._cause = ""

    # port.WorkerClient

    @property
    def state(self) -> port.WorkerState:
        connection = self._usable()
        if isinstance(self._state, port.Ready) and connection is not None and connection.loading:
            return port.Loading(self._state.pid, connection.loading)
        return self._state

    @property
    def models(self) -> tuple[ModelInfo, ...]:
        return tuple(self._life.connection.models.values()) if self._life is not None else ()

    @property
    def wired(self) -> dict[str, wire.Wired]:
        return self._life.connection.wired if self._life is not None else {}

    @property
    def broken(self) -> dict[str, errors.MLXServingError]:
        return self._models.broken

    def health(self) -> list[port.WorkerHealth]:
        state, life = self.state, self._life
        serves = isinstance(state, port.Ready) or self._usable() is not None
        cause = getattr(state, "cause", self._cause)
        return [
            port.WorkerHealth(
                pid=life.pid if life is not None else None,
                state=reasons.tag(state),
                phase=life.phase if life is not None else "",
                models=tuple(info.model_id for info in self.models),
                cause=None if serves else reasons.brief(cause) or None,
                restarts=self._restarts,
                breaker=reasons.breaker_name(self._breaker),
                retry_in_s=reasons.retry_in_s(state, self._now()),
                broken={model_id: error.message for model_id, error in self.broken.items()},
                streams_waiting=len(self._backlog),
            )
        ]

    def start(self) -> None:
        if self._run_task is None or self._run_task.done():
            self._restarts = 0
            self._breaker = Closed()
            self._set_state(port.Starting())
            self._run_task = asyncio.create_task(self._guarded_run(), name="worker-supervisor")

    async def stop(self, deadline_s: float = 5.0) -> None:
        self._set_state(port.Stopped())
        task, self._run_task = self._run_task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        stopped = errors.Draining("the server is shutting down")
        self._backlog.end(lambda _: stopped)
        life, self._life = self._life, None
        if life is not None:
            life.connection.send(wire.Shutdown())
            life.connection.abandon(stopped)
            life.connection.close()
            await ended(life.process, deadline_s)

    def restart(self) -> None:
        """Replace the worker; streams go on in the next one. Lifts quarantines and back-off."""
        if not self._revive:
            log.warning("without a supervisor the worker cannot be replaced")
            return
        self._models.pardon()
        self._breaker = Closed()
        self._hurry.set()
        if self._life is not None:
            self._life.replace("as asked", self._replace_timeout_s)

    async def load_model(
        self, model_id: str, path: str, options: wire.ModelOptions | None = None
    ) -> ModelInfo:
        options = options or wire.ModelOptions()
        while True:
            self._models.check_quarantine(model_id)
            connection = await self._connected()
            try:
                info = await connection.load_model(model_id, path, options)
                break
            except errors.WorkerDied:
                # Its share in the death is counted; who waits here is not to know.
                if not self._revive:
                    raise
            except errors.MLXServingError as error:
                self.on_event(port.ModelLoadFailed(model_id, error.code, error.message))
                raise
        self._models.loaded(model_id, path, options)
        self._give_orders(connection, model_id)
        self.on_event(port.ModelReady(info))
        return info

    async def unload_model(self, model_id: str) -> None:
        self._models.unwant(model_id)
        connection = self._usable()
        if connection is not None and model_id in connection.models:
            await connection.unload_model(model_id)
            self.on_event(port.ModelGone(model_id))

    def order(self, order: wire.Order) -> None:
        self._models.order(order)
        if self._life is not None:
            self._life.connection.send(order)

    def bound(self, deadlines: Deadlines, resume_timeout_s: float, rss_limit_bytes: int) -> None:
        self._deadlines, self._resume_timeout_s = deadlines, resume_timeout_s
        self._growth.limit_bytes = rss_limit_bytes

    async def clear_cache(self, model_id: str) -> CacheStats:
        connection = self._usable()
        if connection is None or model_id not in connection.models:
            return CacheStats()
        return await connection.clear_cache(model_id)

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
        request = wire.Submit(
            seq_id=next(self._seq_ids),
            model_id=model_id,
            token_ids=list(token_ids),
            prompt_len=len(token_ids) if prompt_len is None else prompt_len,
            sampling=sampling,
            priority=priority,
            grammar=grammar,
            cache_salt=cache_salt,
            pooled=pooled,
            second_at=second_at,
            turn=turn,
        )
        stream = SequenceStream(request)
        connection = self._usable()
        if connection is not None and not self._backlog.holds:
            self._send(stream, connection)
        else:
            self._park(stream)
        return stream

    # The life of workers

    async def _guarded_run(self) -> None:
        """Nobody may wait for a supervisor that has failed by a mistake of ours."""
        try:
            await self._run()
        except Exception as error:
            log.exception("the supervisor failed")
            if self._life is not None:
                self._life.process.kill()
            self._fail(port.Failed(f"the supervisor failed: {error!r}"))

    async def _run(self) -> None:
        while True:
            self._set_state(port.Starting())
            death = await self._live()
            pid, cause = death.pid, death.cause
            self._cause = cause
            if not self._revive:
                self._fail(failed := port.Failed(cause))
                self.on_event(port.WorkerExited(pid, cause, failed))
                return
            in_s = self._decide(death)
            waiting: port.Restarting | port.CircuitOpen
            match self._breaker:
                case Open(until_s, _):
                    waiting = port.CircuitOpen(until_s, cause)
                case Closed(deaths_s):
                    waiting = port.Restarting(len(deaths_s), in_s, cause)
                case HalfOpen():
                    raise AssertionError("nothing is half-open after a death")
            self._set_state(waiting)
            self.on_event(port.WorkerExited(pid, cause, waiting))
            log.warning("the next worker starts in %.1f s: %s", in_s, cause)
            self._restarts += 1
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._hurry.wait(), in_s)
            self._breaker = after_wait(self._breaker)

    def _decide(self, death: Death) -> float:
        """Move the breaker. Returns the seconds to wait."""
        self._hurry.clear()
        if death.wanted:
            return 0.0
        assert not isinstance(self._breaker, Open)
        wait = after_death(self._policy, self._breaker, self._now(), self._random.random())
        self._breaker = wait.breaker
        return wait.in_s

    async def _live(self) -> Death:
        """One worker from start to death."""
        try:
            life = await Life.begin(self._spawn, self._stats, self._phase, self._now)
        except OSError as error:
            return Death(f"the worker could not be started: {error}")
        self._life = life
        life.connection.on_memory = self._memory
        self._set_state(port.Starting(life.pid))
        watching = asyncio.create_task(life.watch(lambda: self._deadlines, self._check_size))
        try:
            await self._prepare(life)
            await life.connection.lost
        finally:
            watching.cancel()
        death = await life.died()
        self._life = None
        self._bury(life, death)
        return death

    def _check_size(self, life: Life) -> None:
        if not self._revive or self._usable() is None or life.connection.loading:
            return
        rss_bytes, age_s = life.connection.rss_bytes, life.age_s
        if self._growth.outgrown(rss_bytes, age_s):
            self._growth.replaced(age_s)
            held, limit = rss_bytes >> 20, self._growth.limit_bytes >> 20
            log.warning("worker %d has grown to %d MiB: it is replaced", life.pid, held)
            why = f"because it had {held} MiB, more than worker_rss_limit_bytes ({limit})"
            life.replace(why, self._replace_timeout_s)

    async def _prepare(self, life: Life) -> None:
        """Hello, then the models that the last worker had, then its streams. Returns early when
        the worker dies meanwhile."""
        hello = await life.hello()
        if hello is None:
            return
        self.on_event(port.WorkerStarted(life.pid, self._restarts))
        self._reconcile(life.connection, hello)
        models = self._models.to_reload()
        if models:
            self._set_state(port.Loading(life.pid, tuple(model_id for model_id, _, _ in models)))
        for model_id, path, options in models:
            if not await self._reload(life, model_id, path, options):
                return
        assert not isinstance(self._breaker, Open)
        self._breaker = after_probe(self._breaker)
        self._set_state(port.Ready(life.pid))
        life.serves()
        self._backlog.hand_over(lambda stream: self._send_or_fail(stream, life.connection))

    def _reconcile(self, connection: Connection, hello: wire.Hello) -> None:
        differences = reconcile.compare(self._models.wanted, hello.models, hello.sequences)
        for seq_id in differences.cancel:
            connection.send(wire.Cancel(seq_id))
        for model_id in differences.unload:
            connection.send(wire.UnloadModel(model_id))

    async def _reload(
        self, life: Life, model_id: str, path: str, options: wire.ModelOptions
    ) -> bool:
        """False: the worker died over it."""
        try:
            info = await life.load(model_id, path, options)
        except errors.MLXServingError as error:
            self._models.not_reloaded(model_id, error)
            self.on_event(port.ModelLoadFailed(model_id, error.code, error.message))
            return True
        if info is None:
            return False
        # It may survive its loads and none of its steps.
        if isinstance(self._breaker, HalfOpen) and not await life.probe(self._probe(model_id)):
            return False
        self._models.acquit(model_id)
        self._give_orders(life.connection, model_id)
        self.on_event(port.ModelReady(info))
        return True

    def _give_orders(self, connection: Connection, model_id: str) -> None:
        """To a worker that has just loaded a model; before any sequence of it is sent."""
        for order in self._models.orders(model_id):
            connection.send(order)

    def _probe(self, model_id: str) -> wire.Submit:
        """One token."""
        return wire.Submit(
            seq_id=next(self._seq_ids),
            model_id=model_id,
            token_ids=[0],
            prompt_len=1,
            sampling=SamplingParams(temperature=0.0, max_tokens=1),
        )

    # After a death

    def _bury(self, life: Life, death: Death) -> None:
        """Whom to blame, and who goes on."""
        cause = reasons.brief(death.cause)
        died = errors.WorkerDied(cause)
        if not death.wanted and (suspect := life.suspect) is not None:
            self._blame_model(suspect, cause, hung=life.load_hung)
        streams = life.connection.release()
        life.connection.close()
        life.connection.abandon(died)
        if not self._revive:
            for stream in streams:
                stream.fail(died)
            return
        if death.wanted:
            for stream in streams:
                stream.starting = False
        self._backlog.orphaned(streams, self._resume_timeout_s, cause)

    def _blame_model(self, model_id: str, cause: str, *, hung: bool) -> None:
        # A load that hangs costs its whole deadline each time.
        error = self._models.blame(model_id, cause, at_once=hung)
        if error is not None:
            log.error("%s", error.message)
            self.on_event(port.ModelLoadFailed(model_id, error.code, error.message))

    # Sending and parking

    def _usable(self) -> Connection | None:
        """The connection while submissions may be sent: models reloaded, worker not known dead."""
        life = self._life
        if life is None or not isinstance(self._state, port.Ready) or not life.reachable:
            return None
        return life.connection

    def _send(self, stream: SequenceStream, connection: Connection) -> None:
        self._models.check(stream.request.model_id)
        connection.submit(stream)

    def _send_or_fail(self, stream: SequenceStream, connection: Connection) -> bool:
        try:
            self._send(stream, connection)
        except errors.MLXServingError as error:
            stream.fail(error)
            return False
        return True

    def _park(self, stream: SequenceStream) -> None:
        """Keep until the next worker is ready; the timer and the bound say no in time."""
        self._models.check_quarantine(stream.request.model_id)
        self._refuse_if_down()
        if not self._backlog.has_room(MAX_PARKED):
            raise self._unavailable()
        self._backlog.park(stream, self._park_timeout_s)

    async def _connected(self) -> Connection:
        """Wait, a bounded time, for a worker that can be spoken to."""
        try:
            async with asyncio.timeout(self._park_timeout_s):
                while (connection := self._usable()) is None:
                    self._refuse_if_down()
                    await self._changed.wait()
        except TimeoutError:
            raise self._unavailable() from None
        return connection

    def _refuse_if_down(self) -> None:
        match self._state:
            case port.Stopped():
                raise errors.Draining("the worker is stopped")
            case port.Failed() | port.CircuitOpen():
                raise self._unavailable()

    def _expired(self, stream: SequenceStream) -> errors.MLXServingError:
        """Waited long enough: new streams may come again, those that had begun cannot."""
        if stream.resumption() is stream.request:
            return self._unavailable()
        return errors.WorkerDied(
            f"no worker took this sequence over in time: {reasons.brief(self._cause)}"
        )

    def _unavailable(self) -> errors.Overloaded:
        return reasons.unavailable(self._state, self._now())

    def _fail(self, failed: port.Failed) -> None:
        self._set_state(failed)
        self._backlog.end(self._expired)
        if self._life is not None:
            self._life.connection.abandon(self._unavailable())

    # Reports

    def _set_state(self, state: port.WorkerState) -> None:
        self._state = state
        self._changed.set()
        self._changed = asyncio.Event()

    def _stats(self, stats: wire.StepStats) -> None:
        self.on_stats(stats)

    def _memory(self, told: wire.Memory | wire.Short) -> None:
        if isinstance(told, wire.Short):
            self.on_event(port.MemoryShort(told.bytes))
        else:
            self.on_event(port.MemoryUse(told))

    def _phase(self, phase: wire.Phase) -> None:
        self.on_event(port.PhaseChanged(phase.phase, phase.detail, phase.elapsed_s))
