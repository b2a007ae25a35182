"""How a worker's models share its memory: the decision, and the prefix cache that gives way."""

from __future__ import annotations

import random

import pytest

from mlx_serving.runtime.core.memory import Claim, Room, lacks, share
from mlx_serving.runtime.core.prefix import PrefixIndex, most_blocks, pool_blocks


@pytest.mark.parametrize(
    ("claims", "rooms", "short"),
    [
        # Alone: rows and prefixes may take all there is.
        ([Claim()], [Room(100, 100, 100, 100)], 0),
        ([Claim(kv_bytes=30, prefix_bytes=20)], [Room(80, 80, 70, 100)], 0),
        # Who wants a row, or has to grow, is made room for by prefixes, the largest first.
        (
            [Claim(kv_bytes=30, prefix_bytes=50, first=(2, 1), first_bytes=40)],
            [Room(70, 70, 30, 100)],
            0,
        ),
        (
            [Claim(kv_bytes=60, growth_bytes=30), Claim(prefix_bytes=40)],
            [Room(60, 60, 0, 60), Room(30, 30, 10, 40)],
            0,
        ),
        # The first in order is kept room for, whichever model it is of.
        (
            [
                Claim(kv_bytes=40, first=(2, 7), first_bytes=10),
                Claim(first=(2, 3), first_bytes=50),
            ],
            [Room(100, 50, 10, 100), Room(60, 60, 10, 60)],
            0,
        ),
        # More is held than there is, for a model has been loaded: rows give way.
        ([Claim(kv_bytes=90), Claim(kv_bytes=30)], [Room(70, 70, 0, 70), Room(10, 10, 0, 10)], 0),
        # Nothing else is held, and it does not suffice: models have to leave.
        ([Claim(prefix_bytes=20, first=(2, 1), first_bytes=130)], [Room(100, 100, 0, 100)], 30),
        ([Claim(kv_bytes=10, first=(2, 1), first_bytes=130)], [Room(100, 100, 0, 100)], 0),
    ],
)
def test_who_gets_what(claims: list[Claim], rooms: list[Room], short: int) -> None:
    sharing = share(100, claims)
    assert (list(sharing.rooms), sharing.short_bytes) == (rooms, short)


@pytest.mark.parametrize(
    ("claims", "lacking"),
    [
        ([Claim()], [False]),
        ([Claim(kv_bytes=30, first=(2, 1), first_bytes=70)], [False]),
        ([Claim(kv_bytes=30, first=(2, 1), first_bytes=71)], [True]),
        # Prefix caches give way, and are no lack.
        ([Claim(kv_bytes=30, prefix_bytes=70, first=(2, 1), first_bytes=60)], [False]),
        # Who waits for an earlier one's memory lacks it as well.
        (
            [
                Claim(kv_bytes=40, first=(2, 7), first_bytes=20),
                Claim(first=(2, 3), first_bytes=50),
            ],
            [True, False],
        ),
        ([Claim(kv_bytes=100), Claim(first=(2, 3), first_bytes=1)], [False, True]),
    ],
)
def test_who_waits_for_nothing_but_memory_lacks_it(
    claims: list[Claim], lacking: list[bool]
) -> None:
    rooms = share(100, claims).rooms
    assert [lacks(claim, room) for claim, room in zip(claims, rooms, strict=True)] == lacking


def test_obeying_one_after_another_never_overdraws() -> None:
    """Each model in turn takes what it may: together they never hold more than there is."""
    rng = random.Random(1)
    for _ in range(500):
        capacity = rng.randint(50, 200)
        held = [Claim() for _ in range(rng.randint(1, 4))]
        for _ in range(30):
            for i in range(len(held)):
                wish = rng.randint(0, 100)
                held[i] = Claim(
                    kv_bytes=held[i].kv_bytes,
                    prefix_bytes=held[i].prefix_bytes,
                    growth_bytes=rng.choice([0, 0, 10]),
                    first=(2, i) if wish else None,
                    first_bytes=wish,
                )
                room = share(capacity, held).rooms[i]
                kv = min(room.kv_bytes, rng.choice([0, held[i].kv_bytes, room.admit_bytes]))
                left = max(0, room.total_bytes - kv)
                prefix = min(held[i].prefix_bytes + 5, room.prefix_bytes, left)
                held[i] = Claim(kv_bytes=kv, prefix_bytes=prefix)
                assert sum(c.kv_bytes + c.prefix_bytes for c in held) <= capacity


def test_a_pool_is_never_larger_than_its_room() -> None:
    for most in (10, 64, 100, 1000):
        for room in range(1100):
            ids = most_blocks(room, most)
            assert pool_blocks(ids, most) <= room
            assert ids == most or pool_blocks(ids + 1, most) > room or room < 64
            assert most_blocks(pool_blocks(ids, most), most) == ids  # what is held may stay


def test_an_index_shrinks_to_its_best_blocks_and_numbers_them_anew() -> None:
    index = PrefixIndex(100, 4)
    chain = []
    for i in range(10):
        block = index.add(None, bytes([i]), 0)
        assert block is not None
        chain.append(block)
    index.use(chain[7:])
    index.hold(chain[2])
    assert index.shrink(10) is None and index.capacity == 10
    assert index.shrink(4) == (2, 7, 8, 9)
    assert [chain[i].id for i in (2, 7, 8, 9)] == [0, 1, 2, 3]
    assert sorted(index.blocks) == [bytes([i]) for i in (2, 7, 8, 9)]
    assert index.shrink(0) == (0,)  # the one in use
    assert (len(index), index.capacity) == (1, 1)
    assert index.shrink(0) is None
    index.release(chain[2])
    assert index.shrink(0) == () and len(index) == 0
    assert index.shrink(50) is None
    fresh = index.add(None, b"x", 0)
    assert fresh is not None and fresh.id == 0
