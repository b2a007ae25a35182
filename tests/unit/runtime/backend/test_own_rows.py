"""Rows in reserved address space: slabs never move, and a row takes the memory of its own length."""

from __future__ import annotations

import ctypes
import mmap
import random
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import ArraysCache, KVCache

from mlx_serving.runtime import native
from mlx_serving.runtime.backend.in_place import InPlaceLayer
from mlx_serving.runtime.backend.kv import RowSlots
from mlx_serving.runtime.backend.kv_layers import KVLayer, MakeKVLayer
from mlx_serving.runtime.native import ops

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why())

HEADS, DIM, BUCKET = 2, 64, 16
ROWS, ROW_TOKENS = 8, 8192
TOKEN_BYTES = 2 * HEADS * DIM * 4


class Described:
    """A model as far as a store looks at it: the caches that it would make."""

    def __init__(self, *caches: Any) -> None:
        self._caches = caches

    def make_cache(self) -> list[Any]:
        return list(self._caches)


def store(*caches: Any, attention: MakeKVLayer = KVLayer) -> RowSlots:
    model: Any = Described(*caches or (KVCache(),))
    slots = RowSlots(model, ROWS, bucket=BUCKET, attention=attention)
    assert slots.reserve(ops, ROW_TOKENS, TOKEN_BYTES)
    return slots


def vectors(rows: int, count: int, value: float) -> mx.array:
    return mx.full((rows, HEADS, count, DIM), value)


def prefill(slots: RowSlots, row: int, count: int, value: float) -> None:
    """Evaluated after each pass, as the runner does."""
    (cache,) = slots.row_view(row, slots.length(row), count)
    cache.update_and_fetch(vectors(1, count, value), vectors(1, count, -value))
    mx.eval(slots.arrays())


def decode(slots: RowSlots, rows: int, value: float) -> None:
    (cache,) = slots.batch_view({row: slots.length(row) for row in range(rows)}, rows)
    cache.update_and_fetch(vectors(rows, 1, value), vectors(rows, 1, -value))
    mx.eval(slots.arrays())


def contents(slots: RowSlots, row: int) -> tuple[list[float], list[float]]:
    mx.synchronize()
    keys, values = slots.arrays()
    length = slots.length(row)
    return keys[row, 0, :length, 0].tolist(), values[row, -1, :length, -1].tolist()  # type: ignore[return-value]


def address(slab: mx.array) -> int:
    mx.eval(slab)
    return int(np.array(slab, copy=False).__array_interface__["data"][0])


def resident_bytes(slab: mx.array) -> int:
    mx.synchronize()
    first = address(slab) // mmap.PAGESIZE * mmap.PAGESIZE
    pages = -(-(address(slab) + slab.nbytes - first) // mmap.PAGESIZE)
    there = (ctypes.c_ubyte * pages)()
    size = ctypes.c_size_t(pages * mmap.PAGESIZE)
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(first), size, there) == 0
    return sum(page & 1 for page in there) * mmap.PAGESIZE


def resident(slots: RowSlots) -> int:
    return sum(resident_bytes(slab) for slab in slots.arrays())


def written(slots: RowSlots) -> int:
    return sum(slab.nbytes for slab in slots.arrays()) - slots.unwritten_bytes


@pytest.mark.parametrize("attention", [KVLayer, InPlaceLayer])
def test_a_long_row_takes_its_own_memory_and_moves_nobody(attention: MakeKVLayer) -> None:
    slots = store(attention=attention)
    for row in range(3):
        slots.start(row, 64)
        prefill(slots, row, 64, row + 1.0)
    places = [address(slab) for slab in slots.arrays()]
    slots.start(3, 4096)
    prefill(slots, 3, 4096, 9.0)
    decode(slots, 4, 5.0)
    assert [address(slab) for slab in slots.arrays()] == places
    assert contents(slots, 0) == ([1.0] * 64 + [5.0], [-1.0] * 64 + [-5.0])
    assert contents(slots, 3) == ([9.0] * 4096 + [5.0], [-9.0] * 4096 + [-5.0])
    assert written(slots) == (3 * 65 + 4097) * TOKEN_BYTES
    # A page or two more for each head of a row.
    assert 0 <= resident(slots) - written(slots) <= 4 * 2 * HEADS * 2 * mmap.PAGESIZE


@pytest.mark.parametrize("attention", [KVLayer, InPlaceLayer])
def test_a_row_that_ends_gives_its_memory_back_and_is_as_new(attention: MakeKVLayer) -> None:
    slots = store(attention=attention)
    for row, length in enumerate((64, 2048, 64)):
        slots.start(row, length)
        prefill(slots, row, length, row + 1.0)
    places = [address(slab) for slab in slots.arrays()]
    slots.free(1)
    slots.move(2, 1)
    assert [address(slab) for slab in slots.arrays()] == places
    assert contents(slots, 1) == ([3.0] * 64, [-3.0] * 64)
    assert resident(slots) <= written(slots) + 3 * 2 * HEADS * 2 * mmap.PAGESIZE
    slots.start(2, 32)
    prefill(slots, 2, 32, 7.0)
    assert contents(slots, 2) == ([7.0] * 32, [-7.0] * 32)
    keys = slots.arrays()[0]
    assert not keys[2, :, 32:].any().item() and not keys[1, :, 64:2048].any().item()
    for row in range(3):
        slots.free(row)
    assert slots.arrays() == [] and slots.unwritten_bytes == 0


def test_random_lives_of_rows_leave_every_row_what_it_wrote() -> None:
    rng = random.Random(7)
    slots, kept = store(attention=InPlaceLayer), dict[int, list[float]]()
    for step in range(120):
        action = rng.choice(("start", "decode", "end", "cut"))
        if action == "start" and len(kept) < ROWS:
            row, length = len(kept), rng.randint(1, 300)
            slots.start(row, length)
            prefill(slots, row, length, float(step))
            kept[row] = [float(step)] * length
        elif action == "decode" and kept:
            decode(slots, len(kept), float(step))
            kept = {row: [*had, float(step)] for row, had in kept.items()}
        elif action == "end" and kept:
            row, last = rng.randrange(len(kept)), len(kept) - 1
            slots.free(row)
            if row != last:
                slots.move(last, row)
                kept[row] = kept[last]
            del kept[last]
        elif action == "cut" and kept:
            row = rng.randrange(len(kept))
            kept[row] = kept[row][: rng.randint(1, len(kept[row]))]
            slots.truncate(row, len(kept[row]))
        for row, had in kept.items():
            assert contents(slots, row) == (had, [-x for x in had])


def test_recurrent_state_beside_it_grows_as_ever() -> None:
    slots = store(KVCache(), ArraysCache(1))
    for row in range(3):
        slots.start(row, 1)
        kv, state = slots.row_view(row, 0, 1)
        kv.update_and_fetch(vectors(1, 1, 1.0), vectors(1, 1, 1.0))
        state[0] = mx.full((1, 3), row + 1.0)
    assert slots.arrays()[0].shape == (ROWS, HEADS, ROW_TOKENS, DIM)
    assert slots.arrays()[2].shape == (4, 3)
    slots.free(1)
    slots.move(2, 1)
    assert slots.arrays()[2][:2].tolist() == [[1.0] * 3, [3.0] * 3]


def test_address_space_that_is_not_to_be_had_is_refused() -> None:
    assert ops.can_reserve(1 << 30, 4)
    assert not ops.can_reserve(1 << 60, 4)
    held_bytes = mx.get_active_memory()
    with pytest.raises(MemoryError):
        ops.reserve((1 << 20, 1 << 30, 1 << 8), mx.float32)
    assert mx.get_active_memory() == held_bytes, "else MLX waits for room before every operation"
    slab = ops.reserve((4, 1000), mx.uint32)
    assert not slab.any().item() and slab.nbytes == 16_000
    with pytest.raises(ValueError, match="row"):
        ops.give_back([slab], 4)


def test_prefix_blocks_lie_there_too_and_some_can_be_kept() -> None:
    slots = store(attention=InPlaceLayer)
    slots.open_pool(64, 16)
    slots.start(0, 64)
    prefill(slots, 0, 32, 1.0)
    prefill(slots, 0, 32, 2.0)
    mx.eval(slots.publish(0, 0, [5, 6, 1, 2]))
    assert [pool.shape for pool in slots.pool.arrays] == [(64, HEADS, 16, DIM)] * 2
    slots.keep_blocks([1, 5])
    assert [pool.shape for pool in slots.pool.arrays] == [(64, HEADS, 16, DIM)] * 2
    slots.start(1, 33)
    slots.copy_blocks(1, [1, 0])
    assert contents(slots, 1) == ([1.0] * 16 + [2.0] * 16, [-1.0] * 16 + [-2.0] * 16)
    slots.keep_blocks([])
    assert slots.pool.arrays == [] and slots.pool.unwritten_bytes == 0


def test_address_space_is_to_be_had_from_a_cache_of_larger_pieces() -> None:
    for _ in range(20):
        freed = [mx.full((n,), 1, mx.uint8) for n in range(65, 129)]
        mx.eval(freed)
        del freed
        assert not ops.reserve((2, 3), mx.float32).any().item()


def test_blocks_and_rows_are_written_where_they_lie_whatever_is_in_flight() -> None:
    """MLX's own update copies an array that an evaluation in flight holds."""
    slots = store(attention=InPlaceLayer)
    slots.open_pool(64, 16)
    slots.start(0, 64)
    prefill(slots, 0, 64, 1.0)
    mx.eval(slots.publish(0, 0, [0]))
    before = [address(array) for array in (*slots.pool.arrays, *slots.arrays())]
    for block in range(1, 4):
        mx.async_eval(slots.publish(0, 16 * block, [block]))
        slots.start(block, 64)
        slots.copy_blocks(block, list(range(block + 1)))
        mx.async_eval(slots.arrays())
    mx.eval(slots.arrays())
    assert [address(array) for array in (*slots.pool.arrays, *slots.arrays())] == before
    assert contents(slots, 3) == ([1.0] * 64, [-1.0] * 64)


@pytest.mark.parametrize("positions", [2, 5])
def test_rows_or_their_first_positions_are_put_in_place(positions: int) -> None:
    target = ops.reserve((4, 3, 5, 16), mx.float32)
    value = mx.random.normal((positions, 3, 2, 16)).transpose(2, 1, 0, 3)
    mx.eval(value)
    at = address(target)
    target = ops.put(target, value, [3, 1])
    wanted = np.zeros((4, 3, 5, 16), np.float32)
    wanted[[3, 1], :, :positions] = np.asarray(value)
    assert np.array_equal(np.asarray(target), wanted) and address(target) == at


@pytest.mark.parametrize(
    ("shape", "dtype", "rows"),
    [
        ((1, 3, 5, 16), mx.float32, [4]),
        ((1, 3, 5, 16), mx.float32, []),
        ((2, 3, 5, 16), mx.float32, [1]),
        ((1, 2, 5, 16), mx.float32, [1]),
        ((1, 3, 6, 16), mx.float32, [1]),
        ((1, 3, 5), mx.float32, [1]),
        ((1, 3, 5, 16), mx.float16, [1]),
    ],
)
def test_what_does_not_fit_is_refused(
    shape: tuple[int, ...], dtype: mx.Dtype, rows: list[int]
) -> None:
    target = ops.reserve((4, 3, 5, 16), mx.float32)
    with pytest.raises(ValueError, match="put"):
        ops.put(target, mx.zeros(shape, dtype), rows)
