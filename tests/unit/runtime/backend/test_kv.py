"""The row slots by themselves: growth, moves, roll-back."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import ChunkedKVCache, KVCache

from mlx_serving.runtime.backend.kv import RowSlots, UnsupportedCache
from mlx_serving.runtime.backend.separate_rows import SeparateRows

BUCKET = 8
HEADS, DIM = 2, 4


class Described:
    """A model as far as a store looks at it: the caches that it would make."""

    def __init__(self, *caches: Any) -> None:
        self._caches = caches

    def make_cache(self) -> list[Any]:
        return list(self._caches)


def store(*caches: Any, rows: int = 8, **options: Any) -> RowSlots:
    model: Any = Described(*caches)
    return RowSlots(model, rows, bucket=BUCKET, **options)


def write(slots: RowSlots, row: int, start: int, values: list[float]) -> tuple[mx.array, mx.array]:
    """Prefill one row with keys that hold `values`, and values that hold their negatives."""
    (cache,) = slots.row_view(row, start, len(values))
    k = mx.broadcast_to(mx.array(values)[None, None, :, None], (1, HEADS, len(values), DIM))
    keys, other = cache.update_and_fetch(k, -k)
    return keys, other


def contents(slots: RowSlots, row: int) -> list[float]:
    keys = slots.layers[0].keys[row, 0, : slots.length(row), 0]  # type: ignore[union-attr,index]
    return keys.tolist()  # type: ignore[return-value]


def test_slabs_grow_by_buckets_and_rows_by_doubling() -> None:
    slots = store(KVCache())
    slots.start(0, 3)
    write(slots, 0, 0, [1, 2, 3])
    assert slots.arrays()[0].shape == (1, HEADS, BUCKET, DIM)
    slots.start(1, 5)
    slots.start(2, 20)
    write(slots, 2, 0, [7.0] * 20)
    assert slots.arrays()[0].shape == (4, HEADS, 24, DIM)
    assert contents(slots, 0) == [1, 2, 3]
    for row in (0, 1, 2):
        slots.free(row)
    assert slots.arrays() == []


def test_the_budget_forbids_spare_rows() -> None:
    slots = store(KVCache())
    slots.set_budget(5 * BUCKET)
    for row in range(5):
        slots.start(row, 2)
        write(slots, row, 0, [row + 1.0, row + 2.0])
    assert slots.arrays()[0].shape[0] == 5
    assert contents(slots, 3) == [4, 5]


def test_moves_copy_a_row() -> None:
    slots = store(KVCache())
    for row in (0, 1, 2):
        slots.start(row, 3)
        write(slots, row, 0, [row * 10 + 1.0, row * 10 + 2.0])
    slots.free(0)
    slots.move(2, 0)
    assert contents(slots, 0) == [21, 22]
    assert contents(slots, 1) == [11, 12]
    assert slots.length(2) == 0


def test_truncation_is_an_assignment() -> None:
    slots = store(KVCache())
    slots.start(0, 6)
    write(slots, 0, 0, [1, 2, 3, 4, 5, 6])
    slots.truncate(0, 2)
    keys, _ = write(slots, 0, 2, [9])
    assert keys[0, 0, :, 0].tolist() == [1, 2, 9]


def test_idle_rows_are_untouched_by_a_batch() -> None:
    slots = store(KVCache())
    for row, n in enumerate((2, BUCKET, 4)):
        slots.start(row, n)
        write(slots, row, 0, [float(row + 1)] * n)
    before = contents(slots, 1)
    (cache,) = slots.batch_view({0: 2, 2: 4}, 3)
    new = mx.full((3, HEADS, 1, DIM), 50.0)
    keys, _ = cache.update_and_fetch(new, new)
    mask = cache.make_mask(1)
    assert contents(slots, 1) == before and slots.length(1) == BUCKET
    assert contents(slots, 0) == [1, 1, 50] and contents(slots, 2) == [3, 3, 3, 3, 50]
    assert mask.shape == (3, 1, 1, keys.shape[2])
    assert mask[:, 0, 0].sum(axis=-1).tolist()[::2] == [3, 5]


def test_what_has_no_slab_form_runs_row_by_row() -> None:
    with pytest.raises(UnsupportedCache, match="ChunkedKVCache"):
        store(ChunkedKVCache(16))
    model: Any = Described(KVCache())
    rows = SeparateRows(model, 4)
    rows.start(1, 3)
    (cache,) = rows.row_view(1, 0, 3)
    x = mx.ones((1, HEADS, 3, DIM))
    cache.update_and_fetch(x, x)
    saved = rows.snapshot(1)
    rows.move(1, 0)
    rows.truncate(0, 2)
    assert rows.length(0) == rows.row_view(0, 2, 1)[0].offset == 2
    rows.restore(0, saved)
    assert rows.row_view(0, 3, 1)[0].offset == 3
    assert rows.bytes_per_token() > 0 and len(rows.arrays()) == 2
    rows.reset()
    assert rows.arrays() == []
