"""The parent's end of one connection to a worker: futures for models, streams for sequences.

    SequenceStream ──Submit, Cancel, Pause, Resume──▶ Connection ══ socket ══ runtime.loop
                   ◀──────── TokenRow ──────────────  (one Step frame a step)

A stream holds at most one row. What arrives before its reader has taken it is merged into
it; beyond `HIGH_WATER_TOKENS` the worker is told to set the sequence aside until the reader
has taken them. So a slow reader costs bounded memory and no neighbour waits for it.

A stream outlives its connection: it keeps what it was sent, so that `resumption()` asks the next
worker for the rest, and sampling keyed by position gives the tokens that the last one would have.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from socket import MSG_DONTWAIT, socket
from types import TracebackType
from typing import Any, cast

import msgspec

from mlx_serving import clock, errors
from mlx_serving.types import CacheStats, ModelInfo, Priority
from mlx_serving.worker import blame, wire
from mlx_serving.worker.watchdog import Vitals

log = logging.getLogger(__name__)

HIGH_WATER_TOKENS = 256
"""Undelivered tokens at which a sequence is paused; it resumes once its reader took them all."""

MAX_UNSENT_BYTES = 64 * 1024 * 1024
"""What may wait for a worker that does not read (it is loading) before submissions are refused."""

LAST_WORDS_BYTES = 1 << 16


class SequenceStream:
    """The rows of one sequence, as they arrive: `async for row in stream`.

    Ends after the row that has a `finish_reason`, or quietly after `cancel()`. Leaving the loop
    early cancels the sequence; so does leaving `async with stream`, which a caller needs who
    might never begin to iterate. Rows that a slow reader left lying are merged into one. Raises
    what the worker reported for the sequence (errors.py). One reader.

    `starting` and `deaths` are `blame`'s; `on_progress` is called once, at the next token or the end.
    """

    def __init__(self, request: wire.Submit) -> None:
        self.request = request
        self.starting = False
        self.deaths = 0
        self.begun_s: float | None = None
        """When it took its first row; None: it waits for one."""
        self.on_progress: Callable[[], None] | None = None
        self._received: list[int] = []
        self._connection: Connection | None = None
        self._pending: wire.TokenRow | None = None
        self._error: errors.MLXServingError | None = None
        self._ended = False
        self._paused = False
        self._waiter: asyncio.Future[None] | None = None

    @property
    def reused(self) -> None:
        """It is computed for its reader alone."""
        return None

    @property
    def seed(self) -> int:
        return self.request.sampling.seed

    @property
    def ended(self) -> bool:
        """Nothing more will arrive (what has arrived may still be unread)."""
        return self._ended

    @property
    def begun(self) -> bool:
        """It has taken a row, in this worker or in one before."""
        return self.starting or bool(self._received)

    def begin(self, now_s: float) -> None:
        """It takes a row in the step that is about to be computed."""
        self.starting = True
        if self.begun_s is None:
            self.begun_s = now_s

    def cancel(self) -> None:
        """Stop the sequence; its row is free at the worker's next step. Idempotent."""
        if not self._ended:
            connection, self._connection = self._connection, None
            if connection is not None:
                connection.drop(self.request.seq_id)
            self._end()

    def fail(self, error: errors.MLXServingError) -> None:
        """End the stream; its reader gets what arrived before, then the error."""
        if not self._ended:
            self._error = error
            self._end()

    def resumption(self) -> wire.Submit:
        """The request for what has not arrived yet. A suspect is tried at once: beside others that
        keep it from its first token it would be a suspect of their deaths too."""
        request = self.request
        if self.deaths:
            request = msgspec.structs.replace(request, priority=Priority.CRITICAL)
        if not self._received:
            return request
        token_ids = [*request.token_ids, *self._received]
        return msgspec.structs.replace(request, token_ids=token_ids)

    def attach(self, connection: Connection) -> None:
        """From now on the rows come from there."""
        self._connection = connection

    def detach(self) -> None:
        """The worker has gone. What has arrived stays to be read; a reader that is still behind is
        noticed again at the next worker's first row."""
        self._connection = None
        self._paused = False

    def push(self, row: wire.TokenRow) -> None:
        """Take over a row, which must not be used any more by the caller."""
        if row.error is not None:
            self.fail(errors.from_code(*row.error, param=row.error_param))
            return
        self._received += row.token_ids
        self._pending = row if self._pending is None else _merge(self._pending, row)
        blame.acquit(self)
        if row.finish_reason is not None:
            self._end()
            return
        self._progress()
        if len(self._pending.token_ids) >= HIGH_WATER_TOKENS and not self._paused:
            self._paused = True
            if self._connection is not None:
                self._connection.send(wire.Pause(self.request.seq_id))
        self._wake()

    def __aiter__(self) -> AsyncIterator[wire.TokenRow]:
        return self._rows()

    async def __aenter__(self) -> SequenceStream:
        return self

    async def __aexit__(
        self, _t: type[BaseException] | None, _e: BaseException | None, _tb: TracebackType | None
    ) -> None:
        self.cancel()

    async def _rows(self) -> AsyncIterator[wire.TokenRow]:
        try:
            while True:
                if (row := self._take()) is not None:
                    yield row
                elif self._error is not None:
                    raise self._error.with_traceback(None)
                elif self._ended:
                    return
                else:
                    self._waiter = asyncio.get_running_loop().create_future()
                    await self._waiter
        finally:
            self.cancel()

    def _take(self) -> wire.TokenRow | None:
        row, self._pending = self._pending, None
        if self._paused:
            self._paused = False
            if self._connection is not None and not self._ended:
                self._connection.send(wire.Resume(self.request.seq_id))
        return row

    def _end(self) -> None:
        self._ended = True
        self._connection = None
        self._progress()
        self._wake()

    def _progress(self) -> None:
        if self.on_progress is not None:
            on_progress, self.on_progress = self.on_progress, None
            on_progress()

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


def _merge(old: wire.TokenRow, new: wire.TokenRow) -> wire.TokenRow:
    """One row that says what both said. Extends the old row's lists in place."""
    old.token_ids.extend(new.token_ids)
    logprobs = old.logprobs
    if logprobs is None:
        logprobs = new.logprobs
    elif new.logprobs is not None:
        logprobs.extend(new.logprobs)
    return wire.TokenRow(
        seq_id=old.seq_id,
        token_ids=old.token_ids,
        logprobs=logprobs,
        finish_reason=new.finish_reason,
        stop_token_id=new.stop_token_id,
        cached_tokens=old.cached_tokens,  # what a resumption finds in a cache is not the prompt's
        vector=new.vector,
        cache_write_tokens=old.cache_write_tokens,
    )


class Connection(asyncio.Protocol):
    """One worker's socket. Whoever opened it watches `lost`, finds out why, takes the streams with
    `release` and calls `abandon`.

    `hello` and `lost` are futures; `lost` never fails. `phase` is what the worker said last.
    """

    def __init__(
        self,
        on_stats: Callable[[wire.StepStats], None],
        on_phase: Callable[[wire.Phase], None],
        now: clock.Clock = clock.monotonic,
    ) -> None:
        loop = asyncio.get_running_loop()
        self._now = now
        self._heard_s = self._advanced_s = now()
        self.hello: asyncio.Future[wire.Hello] = loop.create_future()
        self.lost: asyncio.Future[None] = loop.create_future()
        self.models: dict[str, ModelInfo] = {}
        self.wired: dict[str, wire.Wired] = {}
        self.phase: wire.Phase | None = None
        self.rss_bytes = 0
        """As it told last."""
        self.on_memory: Callable[[wire.Memory | wire.Short], None] = lambda _: None
        self._on_stats = on_stats
        self._on_phase = on_phase
        self._splitter = wire.FrameSplitter()
        self._transport: asyncio.Transport | None = None
        self._last_words: socket | None = None
        """The socket once more, for what the transport leaves unread when it fails to write."""
        self._loads: dict[str, asyncio.Future[ModelInfo]] = {}
        self._unloads: dict[str, asyncio.Future[None]] = {}
        self._clears: dict[str, asyncio.Future[CacheStats]] = {}
        self._streams: dict[int, SequenceStream] = {}

    @classmethod
    async def open(
        cls,
        sock: socket,
        on_stats: Callable[[wire.StepStats], None],
        on_phase: Callable[[wire.Phase], None],
        now: clock.Clock = clock.monotonic,
    ) -> Connection:
        """Takes over one end of a Unix socket pair; the caller awaits `hello`."""
        loop = asyncio.get_running_loop()
        last_words = sock.dup()
        _, connection = await loop.create_unix_connection(
            lambda: cls(on_stats, on_phase, now), sock=sock
        )
        connection._last_words = last_words
        return connection

    @property
    def loading(self) -> tuple[str, ...]:
        """The models that were asked for and are not there yet, in the order of their loads."""
        return tuple(self._loads)

    def vitals(self) -> Vitals:
        """For the watchdog."""
        now_s = self._now()
        phase = "starting" if self.phase is None else self.phase.phase
        return Vitals(phase, now_s - self._heard_s, now_s - self._advanced_s)

    def excuse(self, late_s: float) -> None:
        """It was this process that did not look, for so long."""
        self._heard_s += late_s
        self._advanced_s += late_s

    async def load_model(
        self, model_id: str, path: str, options: wire.ModelOptions | None = None
    ) -> ModelInfo:
        """See port.WorkerClient. Callers that ask for the same model share one load."""
        if model_id in self.models:
            return self.models[model_id]
        if model_id not in self._loads:
            self._loads[model_id] = asyncio.get_running_loop().create_future()
            self.send(wire.LoadModel(model_id, path, options or wire.ModelOptions()))
        return await asyncio.shield(self._loads[model_id])

    async def unload_model(self, model_id: str) -> None:
        if model_id not in self._unloads:
            self._unloads[model_id] = asyncio.get_running_loop().create_future()
            self.send(wire.UnloadModel(model_id))
        await asyncio.shield(self._unloads[model_id])

    async def clear_cache(self, model_id: str) -> CacheStats:
        """What is left of a model's prefix cache: what running sequences use."""
        if model_id not in self._clears:
            self._clears[model_id] = asyncio.get_running_loop().create_future()
            self.send(wire.ClearCache(model_id))
        return await asyncio.shield(self._clears[model_id])

    def submit(self, stream: SequenceStream) -> None:
        """Send what the stream still lacks, and attach it.

        Raises Overloaded when too much waits unsent, but never for a stream that had begun.
        """
        assert self._transport is not None
        request = stream.resumption()
        unsent = self._transport.get_write_buffer_size()
        if unsent > MAX_UNSENT_BYTES and request is stream.request:
            raise errors.Overloaded("the worker does not keep up", retry_after_s=1.0)
        self._streams[request.seq_id] = stream
        stream.attach(self)
        self.send(request)

    def drop(self, seq_id: int) -> None:
        """Cancel; rows already on their way are ignored."""
        if self._streams.pop(seq_id, None) is not None:
            self.send(wire.Cancel(seq_id))

    def send(self, message: wire.ToWorker) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(wire.encode(message))

    def close(self) -> None:
        """Flush what was sent, then close; from now on it counts as lost."""
        if self._transport is not None:
            self._transport.close()
        if not self.lost.done():
            self.lost.set_result(None)

    def release(self) -> list[SequenceStream]:
        """Its streams, to go on elsewhere. Rows that still come are nobody's."""
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.detach()
        return list(streams.values())

    def abandon(self, error: errors.MLXServingError) -> None:
        """End everything that waits for this worker with `error`."""
        for stream in self.release():
            stream.fail(error)
        waiting: list[asyncio.Future[Any]]
        waiting = [self.hello, *self._loads.values(), *self._unloads.values()]
        waiting += self._clears.values()
        self._loads, self._unloads, self._clears = {}, {}, {}
        for future in waiting:
            if not future.done():
                future.set_exception(error)
                future.exception()  # whoever waits raises it; nobody else need retrieve it

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are of no asyncio class.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._heard_s = self._now()
        for body in self._splitter.feed(data):
            self._handle(wire.decode_from_worker(body))

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None:
            log.debug("worker connection: %r", exc)
        if self._last_words is not None:
            with self._last_words as sock, contextlib.suppress(OSError):
                while data := sock.recv(LAST_WORDS_BYTES, MSG_DONTWAIT):
                    self.data_received(data)
        if not self.lost.done():
            self.lost.set_result(None)

    def _handle(self, message: wire.FromWorker) -> None:
        last = self.phase
        if not isinstance(message, wire.Phase) or last is None or message.phase != last.phase:
            self._advanced_s = self._heard_s
        match message:
            case wire.Step():
                self._deliver(message)
            case wire.Started(seq_ids):
                for seq_id in seq_ids:
                    if (stream := self._streams.get(seq_id)) is not None:
                        stream.begin(self._now())
            case wire.Phase():
                self.phase = message
                self.rss_bytes = message.rss_bytes or self.rss_bytes
                self._on_phase(message)
            case wire.Memory() | wire.Short():
                self.on_memory(message)
            case wire.Hello():
                self.hello.set_result(message)
            case wire.ModelLoaded(info):
                self.models[info.model_id] = info
                if (load := self._loads.pop(info.model_id, None)) is not None and not load.done():
                    load.set_result(info)
            case wire.ModelFailed(model_id, code, reason):
                if (load := self._loads.pop(model_id, None)) is not None and not load.done():
                    load.set_exception(errors.from_code(code, reason))
                    load.exception()
            case wire.CacheCleared(model_id, stats):
                clear = self._clears.pop(model_id, None)
                if clear is not None and not clear.done():
                    clear.set_result(stats)
            case wire.Wired(model_id):
                self.wired[model_id] = message
            case wire.ModelUnloaded(model_id):
                self.models.pop(model_id, None)
                self.wired.pop(model_id, None)
                unload = self._unloads.pop(model_id, None)
                if unload is not None and not unload.done():
                    unload.set_result(None)

    def _deliver(self, step: wire.Step) -> None:
        if step.stats is not None:
            self._on_stats(step.stats)
        streams = self._streams
        for row in step.rows:
            stream = streams.get(row.seq_id)
            if stream is not None:
                if row.finish_reason is not None:
                    del streams[row.seq_id]
                stream.push(row)
