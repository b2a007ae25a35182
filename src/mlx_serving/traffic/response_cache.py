"""Whole answers of deterministic requests, for when the same is asked again.

A lookup never fails: a store that is lost, slow or damaged is a miss, and is left alone for a while.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from mlx_serving import clock
from mlx_serving.config import Config
from mlx_serving.telemetry.metrics import Metrics
from mlx_serving.traffic.source import Ask
from mlx_serving.traffic.stores import breaker, open_store
from mlx_serving.traffic.stores.port import Bounds, Size, Store, StoreError
from mlx_serving.traffic.transcript import Transcript
from mlx_serving.worker.wire import TokenRow

log = logging.getLogger(__name__)

T = TypeVar("T")
Lookup = Literal["hit", "miss", "error"]

TIMEOUT_S = 0.5
"""An answer that takes longer to find is better computed."""
MAX_WRITES = 64
"""Answers on their way into the store; more are not kept."""
_CHECKSUM_BYTES = 16
_encode = msgspec.msgpack.Encoder().encode
_decoder = msgspec.msgpack.Decoder(Transcript)


def encode(transcript: Transcript) -> bytes:
    """A checksum, then the transcript: what is damaged in a store must not be told as an answer."""
    body = _encode(transcript)
    return hashlib.sha256(body).digest()[:_CHECKSUM_BYTES] + body


def decode(value: bytes) -> Transcript | None:
    """None: it is damaged, or another version's."""
    checksum, body = value[:_CHECKSUM_BYTES], value[_CHECKSUM_BYTES:]
    if hashlib.sha256(body).digest()[:_CHECKSUM_BYTES] != checksum:
        return None
    try:
        return _decoder.decode(body)
    except msgspec.DecodeError:
        return None


class Replay:
    """A `RowSource` that says again what was said, in the same pieces."""

    reused: Literal["hit"] = "hit"
    begun = True

    def __init__(self, transcript: Transcript, ask: Ask) -> None:
        self._transcript = transcript
        self._prompt_tokens = len(ask.token_ids)
        self.seed = ask.sampling.seed
        self.begun_s = clock.monotonic()
        self._cancelled = False

    def cancel(self) -> None:
        self._cancelled = True

    async def __aiter__(self) -> AsyncIterator[TokenRow]:
        for row in self._transcript.rows(self._prompt_tokens):
            if self._cancelled:
                return
            yield row
            await asyncio.sleep(0)  # a long answer must not hold up other streams


class ResponseCache:
    """`on_lookup` and `on_failure` count; `timeout_s` bounds each use of the store."""

    def __init__(
        self,
        store: Store,
        *,
        on_lookup: Callable[[Lookup], None] = lambda _: None,
        on_failure: Callable[[], None] = lambda: None,
        timeout_s: float = TIMEOUT_S,
        now: clock.Clock = clock.monotonic,
    ) -> None:
        self._store = store
        self._on_lookup = on_lookup
        self._on_failure = on_failure
        self._timeout_s = timeout_s
        self._now = now
        self._breaker: breaker.Breaker = breaker.Closed()
        self._writes: set[asyncio.Task[None]] = set()

    @property
    def usable(self) -> bool:
        """False while a store that has failed is left alone."""
        return isinstance(self._breaker, breaker.Closed)

    def bound(self, bounds: Bounds) -> None:
        self._store.bounds = bounds

    def size(self) -> Size | None:
        return self._store.size()

    async def find(self, key: bytes) -> Transcript | None:
        try:
            value = await self._use(lambda: self._store.get(key))
        except StoreError:
            self._on_lookup("error")
            return None
        transcript = None if value is None else decode(value)
        if value is not None and transcript is None:
            log.warning("a damaged answer was dropped from the response cache")
            self._on_failure()
            self._write(lambda: self._store.drop(key))
        self._on_lookup("miss" if transcript is None else "hit")
        return transcript

    def keep(self, key: bytes, transcript: Transcript) -> None:
        """In the background; what it says now is what is kept."""
        value, tokens = encode(transcript), len(transcript.token_ids)
        self._write(lambda: self._store.put(key, value, tokens))

    async def close(self) -> None:
        """Writes that are under way are waited for, no longer than any use of the store."""
        if self._writes:
            await asyncio.wait(self._writes, timeout=self._timeout_s)
        await self._store.close()

    def _write(self, act: Callable[[], Awaitable[None]]) -> None:
        async def write() -> None:
            try:
                await self._use(act)
            except StoreError as error:
                log.debug("not kept: %s", error)

        if len(self._writes) >= MAX_WRITES:
            self._on_failure()
            return
        task = asyncio.create_task(write(), name="response cache")
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)

    async def _use(self, act: Callable[[], Awaitable[T]]) -> T:
        """Raises StoreError: it failed, took too long, or has lately and is left alone."""
        trying = breaker.attempt(self._breaker, self._now())
        if trying is None:
            raise StoreError("left alone for a while")
        self._breaker = trying
        try:
            async with asyncio.timeout(self._timeout_s):
                result = await act()
        except Exception as error:  # whatever it is, the request goes on without the store
            if isinstance(self._breaker, breaker.Closed):
                log.warning("response cache: %s", str(error) or "the store is too slow")
            self._breaker = breaker.failed(trying, self._breaker, self._now())
            self._on_failure()
            raise StoreError(str(error)) from error
        self._breaker = breaker.Closed()
        return result


def open_cache(config: Config, folder: Path, metrics: Metrics) -> ResponseCache | None:
    """The cache that the settings want; files go to `folder`. Raises ConfigError."""
    if config.response_cache == "off":
        return None
    return ResponseCache(
        open_store(config.response_cache, bounds(config), folder, config.response_cache_url),
        on_lookup=lambda result: metrics.cache_lookups.labels(result).inc(),
        on_failure=metrics.cache_failures.inc,
    )


def bounds(config: Config) -> Bounds:
    return Bounds(
        entries=config.response_cache_entries,
        tokens=config.response_cache_tokens,
        bytes=config.response_cache_bytes,
        ttl_s=config.response_cache_ttl_s,
    )


def moved(old: Config, new: Config) -> bool:
    """Whether answers are kept elsewhere now: the cache is another, and empty for this server."""
    where = old.response_cache, old.response_cache_url
    return where != (new.response_cache, new.response_cache_url)
