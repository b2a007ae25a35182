"""Keeps one worker process alive, and every stream alive beyond it.

    starting ─▶ loading ─▶ ready ──death, restart()──▶ restarting ─▶ starting …   (stop: ─▶ stopped)
                                    └──crash loop──▶ open ─▶ starting (half-open: loads and probes)

One task (`_run`) walks these states; everything else reads them. Streams of a worker that died
are sent to the next one with the tokens that they have; what cannot be sent in the present state
waits in the backlog. When to start, whom to blame, and what is stuck are decided in `breaker`,
`blame` and `watchdog`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
from collections.abc import Callable, Sequence
from typing import Any

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
from mlx_serving.worker.models import Models
from mlx_serving.worker.process import Process, WorkerProcess, ended
from mlx_serving.worker.watchdog import Deadlines, stuck

log = logging.getLogger(__name__)

EXIT_TIMEOUT_S = 1.0
"""How long a worker whose socket has closed may take to exit by itself."""
EXPLAIN_S = 0.5
"""How long a stuck worker gets to say where it is."""
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
        self._ready_s = now()
        """When the present worker was."""
        self._revive = revive
        self._random = random.Random(seed)
        self._spawn = spawn
        self._now = now
        self._state: port.WorkerState = port.Stopped()
        self._changed = asyncio.Event()
        self._run_task: asyncio.Task[None] | None = None
        self._process: Process | None = None
        self._connection: Connection | None = None
        """The living worker's; see `_usable`."""
        self._breaker: Breaker = Closed()
        self._hurry = asyncio.Event()
        """Start the next worker without waiting for the back-off."""
        self._replacing = ""
        """Why the present worker is."""
        self._stuck: str | None = None
        """What the watchdog ended the present worker for."""
        self._models = Models(max_deaths)
        self._probing: str | None = None
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
        return tuple(self._connection.models.values()) if self._connection is not None else ()

    @property
    def wired(self) -> dict[str, wire.Wired]:
        return self._connection.wired if self._connection is not None else {}

    @property
    def broken(self) -> dict[str, errors.MLXServingError]:
        return self._models.broken

    def health(self) -> list[port.WorkerHealth]:
        state, connection = self.state, self._connection
        serves = isinstance(state, port.Ready) or self._usable() is not None
        cause = getattr(state, "cause", self._cause)
        return [
            port.WorkerHealth(
                pid=self._process.pid if self._process is not None else None,
                state=reasons.tag(state),
                phase=connection.phase.phase if connection is not None and connection.phase else "",
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
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.send(wire.Shutdown())
            connection.abandon(stopped)
            connection.close()
        process, self._process = self._process, None
        if process is not None:
            if connection is None:
                process.kill()
            await ended(process, deadline_s)

    def restart(self) -> None:
        """Replace the worker; streams go on in the next one. Lifts quarantines and back-off."""
        if not self._revive:
            log.warning("without a supervisor the worker cannot be replaced")
            return
        self._models.pardon()
        self._breaker = Closed()
        self._hurry.set()
        self._replace("as asked")

    def _replace(self, why: str) -> None:
        connection, process = self._connection, self._process
        if connection is not None and process is not None and not self._replacing:
            self._replacing = why
            connection.send(wire.Shutdown())
            asyncio.get_running_loop().call_later(self._replace_timeout_s, process.kill)

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
        if self._connection is not None:
            self._connection.send(order)

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
            if self._process is not None:
                self._process.kill()
            self._fail(port.Failed(f"the supervisor failed: {error!r}"))

    async def _run(self) -> None:
        while True:
            self._set_state(port.Starting())
            cause = self._cause = await self._live()
            pid = self._process.pid if self._process is not None else 0
            self._process = None
            if not self._revive:
                self._fail(failed := port.Failed(cause))
                self.on_event(port.WorkerExited(pid, cause, failed))
                return
            in_s = self._decide()
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

    def _decide(self) -> float:
        """Move the breaker. Returns the seconds to wait."""
        self._hurry.clear()
        if self._replacing:
            self._replacing = ""
            return 0.0
        assert not isinstance(self._breaker, Open)
        wait = after_death(self._policy, self._breaker, self._now(), self._random.random())
        self._breaker = wait.breaker
        return wait.in_s

    async def _live(self) -> str:
        """One worker from start to death; returns the death's cause."""
        self._stuck = None
        try:
            process = self._process = self._spawn()
        except OSError as error:
            return f"the worker could not be started: {error}"
        self._set_state(port.Starting(process.pid))
        connection = await Connection.open(process.socket, self._stats, self._phase, self._now)
        connection.on_memory = self._memory
        self._connection = connection
        watching = asyncio.create_task(self._watch(connection, process))
        try:
            await self._prepare(connection, process)
            await connection.lost
        finally:
            watching.cancel()
        status = await ended(process, EXIT_TIMEOUT_S)
        self._connection = None
        cause = process.cause(status)
        if self._stuck is not None:
            cause = f"{self._stuck}; {cause}"
        elif self._replacing:
            cause = f"replaced {self._replacing}; {cause}"
        self._bury(connection, cause)
        return cause

    async def _watch(self, connection: Connection, process: Process) -> None:
        """End a worker that is stuck, after its last words."""
        while self._stuck is None:
            tick_s = self._deadlines.tick_s
            before_s = self._now()
            await asyncio.sleep(tick_s)
            late_s = self._now() - before_s - tick_s
            if late_s > tick_s:
                connection.excuse(late_s)
            self._check_size(connection, process)
            self._stuck = stuck(self._deadlines, connection.vitals())
        log.error("worker %d is stuck: %s", process.pid, self._stuck)
        process.explain()
        await asyncio.sleep(EXPLAIN_S)
        process.kill()
        connection.close()

    def _check_size(self, connection: Connection, process: Process) -> None:
        age_s = self._now() - self._ready_s
        if not self._revive or self._usable() is None or connection.loading:
            return
        if self._growth.outgrown(connection.rss_bytes, age_s):
            self._growth.replaced(age_s)
            held, limit = connection.rss_bytes >> 20, self._growth.limit_bytes >> 20
            log.warning("worker %d has grown to %d MiB: it is replaced", process.pid, held)
            self._replace(f"because it had {held} MiB, more than worker_rss_limit_bytes ({limit})")

    async def _prepare(self, connection: Connection, process: Process) -> None:
        """Hello, then the models that the last worker had, then its streams. Returns early when
        the worker dies meanwhile."""
        await _first(connection.hello, connection.lost)
        if not connection.hello.done():
            return
        self.on_event(port.WorkerStarted(process.pid, self._restarts))
        self._reconcile(connection, connection.hello.result())
        models = self._models.to_reload()
        if models:
            self._set_state(port.Loading(process.pid, tuple(model_id for model_id, _, _ in models)))
        for model_id, path, options in models:
            if not await self._reload(connection, model_id, path, options):
                return
        assert not isinstance(self._breaker, Open)
        self._breaker = after_probe(self._breaker)
        self._set_state(port.Ready(process.pid))
        self._ready_s = self._now()
        self._backlog.hand_over(lambda stream: self._send_or_fail(stream, connection))

    def _reconcile(self, connection: Connection, hello: wire.Hello) -> None:
        differences = reconcile.compare(self._models.wanted, hello.models, hello.sequences)
        for seq_id in differences.cancel:
            connection.send(wire.Cancel(seq_id))
        for model_id in differences.unload:
            connection.send(wire.UnloadModel(model_id))

    async def _reload(
        self, connection: Connection, model_id: str, path: str, options: wire.ModelOptions
    ) -> bool:
        """False: the worker died over it."""
        load = asyncio.ensure_future(connection.load_model(model_id, path, options))
        try:
            await _first(load, connection.lost)
            if not load.done():
                return False
            info = load.result()
        except errors.MLXServingError as error:
            self._models.not_reloaded(model_id, error)
            self.on_event(port.ModelLoadFailed(model_id, error.code, error.message))
            return True
        finally:
            load.cancel()
        # It may survive its loads and none of its steps.
        if isinstance(self._breaker, HalfOpen) and not await self._probe(connection, model_id):
            return False
        self._models.acquit(model_id)
        self._give_orders(connection, model_id)
        self.on_event(port.ModelReady(info))
        return True

    def _give_orders(self, connection: Connection, model_id: str) -> None:
        """To a worker that has just loaded a model; before any sequence of it is sent."""
        for order in self._models.orders(model_id):
            connection.send(order)

    async def _probe(self, connection: Connection, model_id: str) -> bool:
        """One token of a prompt of ours, so that the next death is not a client's. False: it died."""
        self._probing = model_id
        sampling = SamplingParams(temperature=0.0, max_tokens=1)
        request = wire.Submit(
            seq_id=next(self._seq_ids),
            model_id=model_id,
            token_ids=[0],
            prompt_len=1,
            sampling=sampling,
        )
        stream = SequenceStream(request)
        answered = asyncio.ensure_future(_ended(stream))
        connection.submit(stream)
        await _first(answered, connection.lost)
        stream.cancel()
        if not answered.done():
            return False
        self._probing = None
        if (error := answered.exception()) is not None:
            log.warning("the probe of %r failed: %s", model_id, error)
        return True

    # After a death

    def _bury(self, connection: Connection, cause: str) -> None:
        """Whom to blame, and who goes on."""
        cause = reasons.brief(cause)
        died = errors.WorkerDied(cause)
        if not self._replacing:
            self._blame_model(connection, cause)
        self._probing = None
        streams = connection.release()
        connection.close()
        connection.abandon(died)
        if not self._revive:
            for stream in streams:
                stream.fail(died)
            return
        if self._replacing:
            for stream in streams:
                stream.starting = False
        self._backlog.orphaned(streams, self._resume_timeout_s, cause)

    def _blame_model(self, connection: Connection, cause: str) -> None:
        """A model whose load, or whose probe, the worker died over."""
        phase = connection.phase.phase if connection.phase is not None else ""
        loading = connection.loading[:1] if phase in ("loading", "compiling") else ()
        for model_id in (self._probing,) if self._probing is not None else loading:
            # A load that hangs costs its whole deadline each time.
            hung = self._stuck is not None and bool(loading)
            error = self._models.blame(model_id, cause, at_once=hung)
            if error is not None:
                log.error("%s", error.message)
                self.on_event(port.ModelLoadFailed(model_id, error.code, error.message))

    # Sending and parking

    def _usable(self) -> Connection | None:
        """The connection while submissions may be sent: models reloaded, worker not known dead."""
        connection = self._connection
        if not isinstance(self._state, port.Ready) or connection is None or connection.lost.done():
            return None
        return connection if not self._replacing else None

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
        if self._connection is not None:
            self._connection.abandon(self._unavailable())

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


async def _first(*futures: asyncio.Future[Any]) -> None:
    """Wait until one of them is done; whether it failed is the caller's to see."""
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)


async def _ended(stream: SequenceStream) -> None:
    async for _ in stream:
        pass
