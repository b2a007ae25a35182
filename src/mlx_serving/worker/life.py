"""One worker from its start to its death, and what it died of.

What outlives a worker is the supervisor's: the models that are wanted, the streams, and whether
there is a next one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlx_serving import clock
from mlx_serving.types import ModelInfo
from mlx_serving.worker import wire
from mlx_serving.worker.client import Connection, SequenceStream
from mlx_serving.worker.process import Process, ended
from mlx_serving.worker.watchdog import Deadlines, stuck

log = logging.getLogger(__name__)

EXIT_TIMEOUT_S = 1.0
"""How long a worker whose socket has closed may take to exit by itself."""
EXPLAIN_S = 0.5
"""How long a stuck worker gets to say where it is."""


@dataclass(frozen=True, slots=True)
class Death:
    cause: str
    pid: int = 0
    """0: there was no process to die."""
    wanted: bool = False
    """It was being replaced."""


class Life:
    def __init__(self, process: Process, connection: Connection, now: clock.Clock) -> None:
        self.process = process
        self.connection = connection
        self.replaced = ""
        """Why it is being."""
        self._now = now
        self._serves_since_s = now()
        self._stuck: str | None = None
        """What the watchdog ended it for."""
        self._probing: str | None = None

    @classmethod
    async def begin(
        cls,
        spawn: Callable[[], Process],
        on_stats: Callable[[wire.StepStats], None],
        on_phase: Callable[[wire.Phase], None],
        now: clock.Clock,
    ) -> Life:
        """Raises OSError when it cannot be started."""
        process = spawn()
        try:
            connection = await Connection.open(process.socket, on_stats, on_phase, now)
        except BaseException:
            process.kill()
            await process.exited
            raise
        return cls(process, connection, now)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def reachable(self) -> bool:
        """Not known dead, nor about to be."""
        return not self.connection.lost.done() and not self.replaced

    @property
    def phase(self) -> str:
        """What it said last; "" before it speaks."""
        phase = self.connection.phase
        return phase.phase if phase is not None else ""

    @property
    def age_s(self) -> float:
        """How long it has served."""
        return self._now() - self._serves_since_s

    def serves(self) -> None:
        """From now on it does."""
        self._serves_since_s = self._now()

    def replace(self, why: str, timeout_s: float) -> None:
        """Let it finish its step and go, or kill it."""
        if not self.replaced:
            self.replaced = why
            self.connection.send(wire.Shutdown())
            asyncio.get_running_loop().call_later(timeout_s, self.process.kill)

    async def watch(self, deadlines: Callable[[], Deadlines], look: Callable[[Life], None]) -> None:
        """End it when it is stuck, after its last words. `look` is called as often as that is checked."""
        while self._stuck is None:
            tick_s = deadlines().tick_s
            before_s = self._now()
            await asyncio.sleep(tick_s)
            late_s = self._now() - before_s - tick_s
            if late_s > tick_s:
                self.connection.excuse(late_s)
            look(self)
            self._stuck = stuck(deadlines(), self.connection.vitals())
        log.error("worker %d is stuck: %s", self.pid, self._stuck)
        self.process.explain()
        await asyncio.sleep(EXPLAIN_S)
        self.process.kill()
        self.connection.close()

    # Each of these gives what says that it died over it.

    async def hello(self) -> wire.Hello | None:
        connection = self.connection
        await _first(connection.hello, connection.lost)
        return connection.hello.result() if connection.hello.done() else None

    async def load(self, model_id: str, path: str, options: wire.ModelOptions) -> ModelInfo | None:
        """Raises what it said of the model."""
        load = asyncio.ensure_future(self.connection.load_model(model_id, path, options))
        try:
            await _first(load, self.connection.lost)
            return load.result() if load.done() else None
        finally:
            load.cancel()

    async def probe(self, request: wire.Submit) -> bool:
        """One request of ours, so that the next death is not a client's."""
        self._probing = request.model_id
        stream = SequenceStream(request)
        answered = asyncio.ensure_future(_read(stream))
        self.connection.submit(stream)
        await _first(answered, self.connection.lost)
        stream.cancel()
        if not answered.done():
            return False
        self._probing = None
        if (error := answered.exception()) is not None:
            log.warning("the probe of %r failed: %s", request.model_id, error)
        return True

    # After its end

    async def died(self) -> Death:
        """Its socket has closed: wait until it is reaped."""
        cause = self.process.cause(await ended(self.process, EXIT_TIMEOUT_S))
        if self._stuck is not None:
            cause = f"{self._stuck}; {cause}"
        elif self.replaced:
            cause = f"replaced {self.replaced}; {cause}"
        return Death(cause, self.pid, bool(self.replaced))

    @property
    def suspect(self) -> str | None:
        """The model whose load, or whose probe, it died over."""
        return self._probing or self._load

    @property
    def load_hung(self) -> bool:
        return self._stuck is not None and self._load is not None

    @property
    def _load(self) -> str | None:
        loading = self.connection.loading
        return loading[0] if loading and self.phase in ("loading", "compiling") else None


async def _first(*futures: asyncio.Future[Any]) -> None:
    """Wait until one of them is done; whether it failed is the caller's to see."""
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)


async def _read(stream: SequenceStream) -> None:
    async for _ in stream:
        pass
