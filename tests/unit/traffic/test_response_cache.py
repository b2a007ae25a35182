"""The cache over a store in the test's hands, and what goes into it."""

from __future__ import annotations

import asyncio

import pytest

from mlx_serving.errors import Overloaded
from mlx_serving.traffic.response_cache import MAX_WRITES, ResponseCache, decode, encode
from mlx_serving.traffic.reuse import Reuse
from mlx_serving.traffic.source import digest
from mlx_serving.traffic.stores import breaker
from mlx_serving.traffic.stores.memory import MemoryStore
from mlx_serving.traffic.stores.port import Bounds, StoreError
from mlx_serving.traffic.transcript import Transcript
from mlx_serving.types import TokenLogprob
from mlx_serving.worker.wire import TokenRow
from unit.traffic.conftest import FakeSource, make_ask, settled

ROOMY = Bounds(entries=100, tokens=10_000, bytes=100_000, ttl_s=300)


class Watch:
    """A clock in the test's hands."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Counted:
    """A cache with what it reported."""

    def __init__(self, store, **settings) -> None:
        self.lookups: list[str] = []
        self.failures = 0
        self.cache = ResponseCache(
            store, on_lookup=self.lookups.append, on_failure=self._failed, **settings
        )

    def _failed(self) -> None:
        self.failures += 1


def said(*rows: TokenRow) -> Transcript:
    transcript = Transcript()
    for row in rows:
        transcript.add(row)
    return transcript


def row(*token_ids: int, **fields) -> TokenRow:
    return TokenRow(seq_id=1, token_ids=list(token_ids), **fields)


def test_a_transcript_says_again_what_was_said_in_the_same_pieces() -> None:
    rows = [
        row(1, logprobs=[TokenLogprob(-0.5, (1, 2), (-0.5, -1.0))], cached_tokens=4),
        row(2, 3, logprobs=[TokenLogprob(-1.0), TokenLogprob(-2.0)]),
        row(4, logprobs=[TokenLogprob(0.0)], finish_reason="stop", stop_token_id=4),
    ]
    again = decode(encode(said(*rows)))
    assert again == said(*rows)
    pieces = list(again.rows(cached_tokens=9))
    assert [piece.token_ids for piece in pieces] == [[1], [2, 3], [4]]
    assert [piece.logprobs for piece in pieces] == [r.logprobs for r in rows]
    assert [piece.finish_reason for piece in pieces] == [None, None, "stop"]
    assert [piece.cached_tokens for piece in pieces] == [9, 0, 0]
    assert pieces[-1].stop_token_id == 4


def test_an_end_without_tokens_goes_with_what_came_before() -> None:
    pieces = list(said(row(1), row(finish_reason="length")).rows(0))
    assert [(p.token_ids, p.finish_reason) for p in pieces] == [([1], "length")]
    (only,) = said(row(finish_reason="stop")).rows(0)
    assert (only.token_ids, only.finish_reason) == ([], "stop")


@pytest.mark.parametrize("at", [0, 10, 16, 20, -1])
def test_damage_is_noticed(at) -> None:
    value = bytearray(encode(said(row(1, 2, 3, finish_reason="stop"))))
    value[at] ^= 1
    assert decode(bytes(value)) is None
    assert decode(b"") is None and decode(bytes(value[:9])) is None


async def test_what_ran_to_its_end_is_told_again(source) -> None:
    counted = Counted(MemoryStore(ROOMY))
    reuse = Reuse("off", 100, cache=counted.cache)
    first = await reuse.open(make_ask(), lambda: source)
    source.say(1)
    source.say(2, finish="stop", stop_token_id=2)
    rows = [r async for r in first]
    reuse.keep([first])
    reuse.keep([first])
    await settled()
    assert len(counted.cache._store._entries) == 1

    again = await reuse.open(make_ask(), pytest.fail)
    assert again.reused == "hit" and first.reused == "miss"
    replayed = [r async for r in again]
    # The pieces are the sequence's, however its reader took them.
    assert [r.token_ids for r in replayed] == [[1], [2]]
    assert [t for r in rows for t in r.token_ids] == [1, 2]
    assert replayed[0].cached_tokens == 3 and replayed[-1].finish_reason == "stop"
    assert counted.lookups == ["miss", "hit"]


async def test_without_coalescing_two_at_once_are_computed_twice() -> None:
    reuse = Reuse("off", 100, cache=Counted(MemoryStore(ROOMY)).cache)
    sources = [FakeSource(), FakeSource()]
    one = await reuse.open(make_ask(), lambda: sources[0])
    other = await reuse.open(make_ask(), lambda: sources[1])
    one.cancel()
    assert sources[0].cancelled and not sources[1].cancelled and other.reused == "miss"
    other.cancel()


async def test_failures_and_unfinished_answers_are_not_kept(source) -> None:
    counted = Counted(MemoryStore(ROOMY))
    reuse = Reuse("deterministic", 100, cache=counted.cache)
    reader = await reuse.open(make_ask(), lambda: source)
    source.fail(Overloaded("no"))
    with pytest.raises(Overloaded):
        _ = [r async for r in reader]
    # The gateway calls `keep` for complete answers only; nothing else puts anything in.
    await settled()
    assert not counted.cache._store._entries


@pytest.mark.parametrize(
    ("caching", "looks", "keeps"),
    [("use", True, True), ("refresh", False, True), ("none", False, False)],
)
async def test_bypassing(caching, looks, keeps) -> None:
    counted = Counted(MemoryStore(ROOMY))
    old, new = said(row(7, finish_reason="stop")), FakeSource()
    counted.cache.keep(digest(make_ask()), old)
    await settled()
    reuse = Reuse("off", 100, cache=counted.cache)
    reader = await reuse.open(make_ask(caching=caching), lambda: new)
    assert (reader.reused == "hit") == looks
    if not looks:
        new.say(8, finish="stop")
        assert [r.token_ids async for r in reader] == [[8]]
        reuse.keep([reader])
        await settled()
        kept = await counted.cache.find(digest(make_ask()))
        assert kept.token_ids == ([8] if keeps else [7])
    else:
        reader.cancel()
        assert [r async for r in reader] == []


async def test_random_answers_are_not_kept_even_where_they_are_shared(source) -> None:
    counted = Counted(MemoryStore(ROOMY))
    reuse = Reuse("all", 100, cache=counted.cache)
    reader = await reuse.open(make_ask(sampling={"temperature": 1.0}), lambda: source)
    source.say(1, finish="stop")
    assert [r.token_ids async for r in reader] == [[1]]
    reuse.keep([reader])
    await settled()
    assert counted.lookups == [] and not counted.cache._store._entries


async def test_a_damaged_entry_is_a_miss_and_goes() -> None:
    store = MemoryStore(ROOMY)
    counted = Counted(store)
    await store.put(b"k", b"nonsense", 1)
    assert await counted.cache.find(b"k") is None
    await settled()
    assert (counted.lookups, counted.failures, store.size().entries) == (["miss"], 1, 0)


class Broken:
    """A store that is lost until it is `back`."""

    bounds = ROOMY

    def __init__(self) -> None:
        self.calls = 0
        self.back = False
        self.error: Exception = StoreError("connection refused")

    async def get(self, key: bytes) -> bytes | None:
        self.calls += 1
        if not self.back:
            raise self.error
        return None

    async def put(self, key: bytes, value: bytes, tokens: int) -> None:
        await self.get(key)

    drop = get

    def size(self) -> None:
        return None

    async def close(self) -> None:
        pass


@pytest.mark.parametrize("error", [StoreError("lost"), RuntimeError("ours"), OSError("gone")])
async def test_a_lost_store_is_a_miss_then_left_alone_then_tried_again(error) -> None:
    watch, store = Watch(), Broken()
    store.error = error
    counted = Counted(store, now=watch)
    for _ in range(10):
        assert await counted.cache.find(b"k") is None
    assert store.calls == breaker.MAX_FAILURES and counted.lookups == ["error"] * 10
    assert counted.failures == breaker.MAX_FAILURES and not counted.cache.usable
    watch.now_s = breaker.OPEN_S
    await asyncio.gather(*(counted.cache.find(b"k") for _ in range(5)))
    assert store.calls == breaker.MAX_FAILURES + 1, "one tries for all"
    store.back = True
    watch.now_s += 2 * breaker.OPEN_S
    await counted.cache.find(b"k")
    await counted.cache.find(b"k")
    assert counted.lookups[-2:] == ["miss", "miss"] and counted.cache.usable


async def test_a_store_that_hangs_is_given_up() -> None:
    class Hanging(Broken):
        async def get(self, key: bytes) -> bytes | None:
            await asyncio.Event().wait()

    counted = Counted(Hanging(), timeout_s=0.01)
    assert await counted.cache.find(b"k") is None
    counted.cache.keep(b"k", Transcript())
    await counted.cache.close()
    assert counted.lookups == ["error"] and counted.failures >= 1


async def test_writes_are_bounded() -> None:
    held = asyncio.Event()

    class Slow(Broken):
        async def put(self, key: bytes, value: bytes, tokens: int) -> None:
            await held.wait()

    counted = Counted(Slow(), timeout_s=60)
    for _ in range(MAX_WRITES + 5):
        counted.cache.keep(b"k", Transcript())
    assert counted.failures == 5
    held.set()
    await counted.cache.close()


@pytest.mark.parametrize(
    ("tried", "now", "after"),
    [
        (breaker.Closed(0), breaker.Closed(0), breaker.Closed(1)),
        (breaker.Closed(2), breaker.Closed(2), breaker.Open(11.0, 1.0)),
        (breaker.Closed(2), breaker.Open(9.0, 1.0), breaker.Open(9.0, 1.0)),
        (breaker.Open(11.0, 1.0), breaker.Open(11.0, 1.0), breaker.Open(12.0, 2.0)),
        (breaker.Open(40.0, 30.0), breaker.Open(40.0, 30.0), breaker.Open(40.0, 30.0)),
    ],
)
def test_the_breaker_after_a_failure(tried, now, after) -> None:
    assert breaker.failed(tried, now, 10.0) == after


@pytest.mark.parametrize(
    ("now", "attempt"),
    [
        (breaker.Closed(2), breaker.Closed(2)),
        (breaker.Open(11.0, 1.0), None),
        (breaker.Open(10.0, 1.0), breaker.Open(11.0, 1.0)),
    ],
)
def test_whether_the_breaker_lets_a_call_through(now, attempt) -> None:
    assert breaker.attempt(now, 10.0) == attempt
