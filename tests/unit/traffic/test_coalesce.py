"""One sequence, many readers; the sequence is in the test's hands."""

from __future__ import annotations

import asyncio
import random

import pytest

from mlx_serving.errors import Overloaded
from mlx_serving.traffic.coalesce import AHEAD_TOKENS
from mlx_serving.traffic.reuse import Reuse
from mlx_serving.types import Priority, TokenLogprob, Turn
from mlx_serving.worker.wire import TokenRow
from unit.traffic.conftest import FakeSource, make_ask, settled


class Starts:
    """Counts the sequences that were started."""

    def __init__(self) -> None:
        self.sources: list[FakeSource] = []

    def __call__(self) -> FakeSource:
        self.sources.append(FakeSource())
        return self.sources[-1]


@pytest.fixture
def starts() -> Starts:
    return Starts()


async def read(source) -> tuple[list[int], list[TokenRow]]:
    rows = [row async for row in source]
    return [token for row in rows for token in row.token_ids], rows


async def test_identical_requests_share_a_sequence(starts) -> None:
    joined = []
    reuse = Reuse("deterministic", 100, joined.append)
    readers = [await reuse.open(make_ask(), starts) for _ in range(5)]
    (source,) = starts.sources
    reading = [asyncio.create_task(read(reader)) for reader in readers]
    source.say(7, cached_tokens=2, cache_write_tokens=1)
    source.say(8, 9, finish="stop", stop_token_id=9)
    for index, (tokens, rows) in enumerate(await asyncio.gather(*reading)):
        assert tokens == [7, 8, 9]
        assert (rows[-1].finish_reason, rows[-1].stop_token_id) == ("stop", 9)
        # Only the first had anything computed: the others' whole prompt was somebody else's.
        assert rows[0].cached_tokens == (2 if index == 0 else 3)
        assert rows[0].cache_write_tokens == (1 if index == 0 else 0)
        assert all(row.finish_reason is None for row in rows[:-1])
    assert [reader.reused for reader in readers] == ["miss", *["shared"] * 4]
    assert len(joined) == 4 and len(reuse.flights) == 0


async def test_a_late_one_gets_at_once_what_there_is(starts) -> None:
    reuse = Reuse("deterministic", 100)
    first = await reuse.open(make_ask(), starts)
    (source,) = starts.sources
    for token in range(4):
        source.say(token, logprobs=[TokenLogprob(-1.0)])
    await settled()
    late = await reuse.open(make_ask(), starts)
    row = await anext(aiter(late))
    assert row.token_ids == [0, 1, 2, 3] and len(row.logprobs) == 4
    late.cancel()
    assert not source.cancelled
    first.cancel()
    assert source.cancelled


async def test_each_leaves_alone_and_the_last_cancels(starts) -> None:
    reuse = Reuse("deterministic", 100)
    readers = [await reuse.open(make_ask(), starts) for _ in range(3)]
    reading = [asyncio.create_task(read(reader)) for reader in readers]
    (source,) = starts.sources
    source.say(1)
    await settled()
    reading[0].cancel()  # it is the one that started the sequence
    readers[1].cancel()
    await settled()
    assert not source.cancelled
    source.say(2, finish="length")
    assert (await reading[2])[0] == [1, 2]
    assert (await reading[1])[0] == [1], "who cancels ends quietly, as a worker's stream does"
    again = await reuse.open(make_ask(), starts)
    assert len(starts.sources) == 2
    again.cancel()
    again.cancel()
    assert starts.sources[1].cancelled and len(reuse.flights) == 0


async def test_one_that_is_left_before_its_first_row_is_not_joined(starts) -> None:
    reuse = Reuse("deterministic", 100)
    (await reuse.open(make_ask(), starts)).cancel()
    await reuse.open(make_ask(), starts)
    assert len(starts.sources) == 2 and starts.sources[0].cancelled


async def test_a_slow_reader_holds_nobody_up_and_costs_no_memory(starts) -> None:
    reuse = Reuse("deterministic", 100)
    fast = await reuse.open(make_ask(), starts)
    slow = await reuse.open(make_ask(), starts)
    (source,) = starts.sources
    reading = asyncio.create_task(read(fast))
    many = 10 * AHEAD_TOKENS
    for token in range(many):
        source.say(token)
    source.say(many, finish="length")
    assert (await reading)[0] == list(range(many + 1))
    tokens, rows = await read(slow)
    assert tokens == list(range(many + 1)) and len(rows) == 1


async def test_when_nobody_reads_the_sequence_is_not_read_either(starts) -> None:
    reuse = Reuse("deterministic", 100)
    one = await reuse.open(make_ask(), starts)
    other = await reuse.open(make_ask(), starts)
    (source,) = starts.sources
    for token in range(3 * AHEAD_TOKENS):
        source.say(token)
    await settled()
    for _ in range(3 * AHEAD_TOKENS):
        await asyncio.sleep(0)
    assert source.taken == AHEAD_TOKENS
    rows = aiter(one)
    assert len((await anext(rows)).token_ids) == AHEAD_TOKENS
    await anext(rows)
    assert source.taken > AHEAD_TOKENS
    # The fastest leaves: what the other has not read counts again.
    one.cancel()
    assert len((await anext(aiter(other))).token_ids) >= AHEAD_TOKENS
    other.cancel()


async def test_a_failure_is_passed_on_and_never_kept(starts) -> None:
    reuse = Reuse("deterministic", 100)
    readers = [await reuse.open(make_ask(), starts) for _ in range(3)]
    (source,) = starts.sources
    source.say(1)
    source.fail(Overloaded("no room", retry_after_s=3.0))
    errors = []
    for reader in readers:
        got = []
        with pytest.raises(Overloaded) as caught:
            async for row in reader:
                got += row.token_ids
        assert got == [1] and caught.value.retry_after_s == 3.0
        errors.append(caught.value)
    assert len(set(map(id, errors))) == 3, "each may be changed by who reports it"
    await reuse.open(make_ask(), starts)
    assert len(starts.sources) == 2


async def test_a_start_that_is_refused_leaves_nothing(starts) -> None:
    reuse = Reuse("deterministic", 100)

    def refuse():
        raise Overloaded("not now")

    with pytest.raises(Overloaded):
        await reuse.open(make_ask(), refuse)
    assert len(reuse.flights) == 0


async def test_a_full_one_is_followed_by_another(starts) -> None:
    reuse = Reuse("deterministic", 2)
    for _ in range(5):
        await reuse.open(make_ask(), starts)
    assert len(starts.sources) == 3


async def test_the_urgent_does_not_wait_behind_the_patient(starts) -> None:
    reuse = Reuse("deterministic", 100)
    await reuse.open(make_ask(priority=Priority.LOW), starts)
    urgent = await reuse.open(make_ask(priority=Priority.CRITICAL), starts)
    assert urgent.reused == "miss" and len(starts.sources) == 2
    patient = await reuse.open(make_ask(priority=Priority.LOW), starts)
    assert patient.reused == "shared" and len(starts.sources) == 2


@pytest.mark.parametrize(
    ("first_s", "second_s", "shared"),
    [
        (None, None, True),
        (None, 5.0, True),
        (5.0, None, False),
        (5.0, 6.0, False),
        (6.0, 5.0, True),
    ],
)
async def test_nobody_is_given_up_at_another_s_deadline(starts, first_s, second_s, shared) -> None:
    reuse = Reuse("deterministic", 100)
    for deadline_s in (first_s, second_s):
        await reuse.open(make_ask(turn=Turn(deadline_s=deadline_s)), starts)
    assert len(starts.sources) == (1 if shared else 2)


@pytest.mark.parametrize(
    ("coalesce", "fields", "shared"),
    [
        ("off", {}, False),
        ("deterministic", {}, True),
        ("deterministic", {"sampling": {"temperature": 1.0}}, False),
        ("deterministic", {"sampling": {"temperature": 1.0}, "seeded": True}, True),
        ("all", {"sampling": {"temperature": 1.0}}, True),
        ("all", {"caching": "none"}, False),
        ("deterministic", {"caching": "refresh"}, False),
    ],
)
async def test_which_requests_are_shared(starts, coalesce, fields, shared) -> None:
    reuse = Reuse(coalesce, 100)
    for _ in range(2):
        await reuse.open(make_ask(**fields), starts)
    assert len(starts.sources) == (1 if shared else 2)


@pytest.mark.parametrize("seed", range(20))
async def test_any_order_of_saying_reading_and_leaving(seed) -> None:
    """Every reader that stays has every token; the sequence ends when nobody does."""
    rng, reuse, starts = random.Random(seed), Reuse("deterministic", 4), Starts()
    length = rng.randint(1, 40)
    reading: list[tuple[asyncio.Task, bool]] = []
    said: dict[FakeSource, int] = {}

    async def reads(source, stays_for: int | None) -> list[int]:
        tokens: list[int] = []
        async for row in source:
            tokens += row.token_ids
            if stays_for is not None and len(tokens) >= stays_for:
                break
            for _ in range(rng.randint(0, 3)):
                await asyncio.sleep(0)
        source.cancel()
        return tokens

    def talk() -> None:
        for source in starts.sources:
            done = said.get(source, 0)
            for token in range(done, min(length, done + rng.randint(0, 3))):
                source.say(token, finish="length" if token == length - 1 else None)
                said[source] = token + 1

    for _ in range(60):
        if rng.random() < 0.3:
            source = await reuse.open(make_ask(), starts)
            stays_for = rng.choice([None, None, rng.randint(1, length)])
            reading.append((asyncio.create_task(reads(source, stays_for)), stays_for is None))
        talk()
        await asyncio.sleep(0)
    while any(said.get(s, 0) < length and not s.cancelled for s in starts.sources):
        talk()
        await asyncio.sleep(0)
    for task, stays in reading:
        tokens = await task
        assert tokens == list(range(length if stays else len(tokens)))
    assert len(reuse.flights) == 0
