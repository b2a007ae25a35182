"""Keeps one worker process alive: starts it, watches it, restarts it, reloads its models.

    starting ─▶ loading ─▶ ready ──death──▶ restarting ─▶ starting …     (stop: ─▶ stopped)
                                       └──too often──▶ failed

One task (`_run`) walks these states; everything else reads them. What cannot be sent in the
present state is parked, for a bounded time, and sent when the next worker is ready.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any

from mlx_serving import clock, errors
from mlx_serving.types import Grammar, ModelInfo, Priority, SamplingParams
from mlx_serving.worker import port, wire
from mlx_serving.worker.client import Connection, SequenceStream
from mlx_serving.worker.process import Process, WorkerProcess
from mlx_serving.worker.restart import GiveUp, Restart, RestartPolicy, after_death

log = logging.getLogger(__name__)

HELLO_TIMEOUT_S = 30.0
EXIT_TIMEOUT_S = 1.0
"""How long a worker whose socket has closed may take to exit by itself."""
MAX_PARKED = 4096


class Supervisor:
    """port.WorkerClient over a child process (or what else `spawn` starts).

    `park_timeout_s`: how long loads and submissions wait for a worker that is (re)starting.
    `load_timeout_s`: a load that takes longer is taken for a hang; the worker is killed.
    """

    def __init__(
        self,
        *,
        policy: RestartPolicy | None = None,
        park_timeout_s: float = 30.0,
        load_timeout_s: float = 600.0,
        spawn: Callable[[], Process] = WorkerProcess,
        now: clock.Clock = clock.monotonic,
    ) -> None:
        self.on_event: Callable[[port.WorkerEvent], None] = port.ignore
        self.on_stats: Callable[[wire.StepStats], None] = port.ignore
        self._policy = policy or RestartPolicy()
        self._park_timeout_s = park_timeout_s
        self._load_timeout_s = load_timeout_s
        self._spawn = spawn
        self._now = now
        self._state: port.WorkerState = port.Stopped()
        self._changed = asyncio.Event()
        self._run_task: asyncio.Task[None] | None = None
        self._process: Process | None = None
        self._connection: Connection | None = None
        """The living worker's; see `_usable`."""
        self._wanted: dict[str, tuple[str, wire.ModelOptions]] = {}
        self._broken: dict[str, errors.MLXServingError] = {}
        """Models that the present worker could not reload, and why."""
        self._parked: dict[SequenceStream, asyncio.TimerHandle] = {}
        self._seq_ids = itertools.count(1)
        self._restarts = 0

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

    def health(self) -> list[port.WorkerHealth]:
        state, connection = self.state, self._connection
        return [
            port.WorkerHealth(
                pid=self._process.pid if self._process is not None else None,
                state=_tag(state),
                phase=connection.phase.phase if connection is not None and connection.phase else "",
                models=tuple(info.model_id for info in self.models),
                cause=getattr(state, "cause", None),
                restarts=self._restarts,
            )
        ]

    def start(self) -> None:
        if self._run_task is None or self._run_task.done():
            self._restarts = 0
            self._set_state(port.Starting())
            self._run_task = asyncio.create_task(self._guarded_run(), name="worker-supervisor")

    async def stop(self, deadline_s: float = 5.0) -> None:
        self._set_state(port.Stopped())
        task, self._run_task = self._run_task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        stopped = errors.Draining("the server is shutting down")
        for stream in self._unpark():
            stream.fail(stopped)
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.send(wire.Shutdown())
            connection.abandon(stopped)
            connection.close()
        process, self._process = self._process, None
        if process is not None:
            if connection is None:
                process.kill()
            await _end(process, deadline_s)

    async def load_model(
        self, model_id: str, path: str, options: wire.ModelOptions | None = None
    ) -> ModelInfo:
        connection = await self._connected()
        options = options or wire.ModelOptions()
        try:
            async with asyncio.timeout(self._load_timeout_s):
                info = await connection.load_model(model_id, path, options)
        except TimeoutError:
            if self._process is not None:
                self._process.kill()
            connection.close()
            raise errors.ModelBroken(
                f"loading {model_id!r} took longer than {self._load_timeout_s:g} s"
            ) from None
        except errors.WorkerDied:
            raise
        except errors.MLXServingError as error:
            self.on_event(port.ModelLoadFailed(model_id, error.code, error.message))
            raise
        self._wanted[model_id] = (path, options)
        self._broken.pop(model_id, None)
        self.on_event(port.ModelReady(info))
        return info

    async def unload_model(self, model_id: str) -> None:
        self._wanted.pop(model_id, None)
        self._broken.pop(model_id, None)
        connection = self._usable()
        if connection is not None and model_id in connection.models:
            await connection.unload_model(model_id)
            self.on_event(port.ModelGone(model_id))

    def submit(
        self,
        model_id: str,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        prompt_len: int | None = None,
        priority: Priority = Priority.NORMAL,
        grammar: Grammar | None = None,
    ) -> SequenceStream:
        request = wire.Submit(
            seq_id=next(self._seq_ids),
            model_id=model_id,
            token_ids=list(token_ids),
            prompt_len=len(token_ids) if prompt_len is None else prompt_len,
            sampling=sampling,
            priority=priority,
            grammar=grammar,
        )
        stream = SequenceStream(request)
        connection = self._usable()
        if connection is not None:
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
        attempt = 0
        while True:
            self._set_state(port.Starting())
            cause, ready_s = await self._live()
            decision = after_death(self._policy, ready_s, attempt)
            pid = self._process.pid if self._process is not None else 0
            self._process = None
            match decision:
                case GiveUp(deaths):
                    failed = port.Failed(f"{deaths} quick deaths in a row; the last: {cause}")
                    self._fail(failed)
                    self.on_event(port.WorkerExited(pid, cause, failed))
                    return
                case Restart(attempt, in_s):
                    restarting = port.Restarting(attempt, in_s, cause)
                    self._set_state(restarting)
                    self.on_event(port.WorkerExited(pid, cause, restarting))
                    log.warning("restart %d in %.1f s: %s", attempt, in_s, cause)
                    self._restarts += 1
                    await asyncio.sleep(in_s)

    async def _live(self) -> tuple[str, float]:
        """One worker from start to death: (cause, seconds that it was ready)."""
        try:
            process = self._process = self._spawn()
        except OSError as error:
            return f"the worker could not be started: {error}", 0.0
        self._set_state(port.Starting(process.pid))
        ready_at_s: float | None = None
        connection = await Connection.open(process.socket, self._stats, self._phase)
        self._connection = connection
        if await self._prepare(connection, process):
            ready_at_s = self._now()
            await connection.lost
        ready_s = 0.0 if ready_at_s is None else self._now() - ready_at_s
        status = await _end(process, EXIT_TIMEOUT_S)
        self._connection = None
        cause = process.cause(status)
        connection.close()
        connection.abandon(errors.WorkerDied(cause))
        return cause, ready_s

    async def _prepare(self, connection: Connection, process: Process) -> bool:
        """Hello, then the models that the last worker had. False: it died, or never spoke."""
        await _first(HELLO_TIMEOUT_S, connection.hello, connection.lost)
        if not connection.hello.done():
            return False
        self.on_event(port.WorkerStarted(process.pid, self._restarts))
        if self._wanted:
            self._set_state(port.Loading(process.pid, tuple(self._wanted)))
        self._broken.clear()
        for model_id, (path, options) in list(self._wanted.items()):
            if not await self._reload(connection, model_id, path, options):
                return False
        self._set_state(port.Ready(process.pid))
        for stream in self._unpark():
            try:
                self._send(stream, connection)
            except errors.MLXServingError as error:
                stream.fail(error)
        return True

    async def _reload(
        self, connection: Connection, model_id: str, path: str, options: wire.ModelOptions
    ) -> bool:
        """False: the worker died over it, or hangs."""
        load = asyncio.ensure_future(connection.load_model(model_id, path, options))
        try:
            await _first(self._load_timeout_s, load, connection.lost)
            if not load.done():
                return False
            self.on_event(port.ModelReady(load.result()))
        except errors.MLXServingError as error:
            self._broken[model_id] = error
            self.on_event(port.ModelLoadFailed(model_id, error.code, error.message))
        finally:
            load.cancel()
        return True

    # Sending and parking

    def _usable(self) -> Connection | None:
        """The connection while submissions may be sent: models reloaded, worker not known dead."""
        connection = self._connection
        if not isinstance(self._state, port.Ready) or connection is None or connection.lost.done():
            return None
        return connection

    def _send(self, stream: SequenceStream, connection: Connection) -> None:
        broken = self._broken.get(stream.request.model_id)
        if broken is not None:
            raise errors.ModelBroken(broken.message)
        connection.submit(stream)

    def _park(self, stream: SequenceStream) -> None:
        """Keep until the next worker is ready; the timer and the bound say no in time."""
        match self._state:
            case port.Stopped():
                raise errors.Draining("the worker is stopped")
            case port.Failed():
                raise self._unavailable()
        if len(self._parked) >= MAX_PARKED:
            raise self._unavailable()
        loop = asyncio.get_running_loop()
        self._parked[stream] = loop.call_later(self._park_timeout_s, self._give_back, stream)

    def _give_back(self, stream: SequenceStream) -> None:
        del self._parked[stream]
        stream.fail(self._unavailable())

    def _unpark(self) -> list[SequenceStream]:
        parked, self._parked = self._parked, {}
        for timer in parked.values():
            timer.cancel()
        return [stream for stream in parked if not stream.ended]

    async def _connected(self) -> Connection:
        """Wait, a bounded time, for a worker that can be spoken to."""
        try:
            async with asyncio.timeout(self._park_timeout_s):
                while (connection := self._usable()) is None:
                    match self._state:
                        case port.Stopped():
                            raise errors.Draining("the worker is stopped")
                        case port.Failed():
                            raise self._unavailable()
                    await self._changed.wait()
        except TimeoutError:
            raise self._unavailable() from None
        return connection

    def _unavailable(self) -> errors.Overloaded:
        match self._state:
            case port.Failed(cause):
                return errors.Overloaded(
                    f"the worker is down: {cause}", retry_after_s=self._policy.max_s
                )
            case port.Restarting(_, in_s, cause):
                return errors.Overloaded(
                    f"the worker is restarting: {cause}", retry_after_s=max(1.0, in_s)
                )
        return errors.Overloaded("the worker is starting", retry_after_s=1.0)

    def _fail(self, failed: port.Failed) -> None:
        self._set_state(failed)
        for stream in self._unpark():
            stream.fail(self._unavailable())
        if self._connection is not None:
            self._connection.abandon(self._unavailable())

    # Reports

    def _set_state(self, state: port.WorkerState) -> None:
        self._state = state
        self._changed.set()
        self._changed = asyncio.Event()

    def _stats(self, stats: wire.StepStats) -> None:
        self.on_stats(stats)

    def _phase(self, phase: wire.Phase) -> None:
        self.on_event(port.PhaseChanged(phase.phase, phase.detail, phase.elapsed_s))


async def _first(timeout_s: float, *futures: asyncio.Future[Any]) -> None:
    """Wait until one of them is done; whether it failed is the caller's to see."""
    await asyncio.wait(futures, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)


async def _end(process: Process, deadline_s: float) -> int:
    """Wait for the exit; kill at the deadline. Returns the exit status: it is reaped."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(deadline_s):
            return await asyncio.shield(process.exited)
    process.kill()
    return await process.exited


def _tag(state: port.WorkerState) -> str:
    return str(state.__struct_config__.tag)
