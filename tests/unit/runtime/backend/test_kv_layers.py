"""A layer over slabs: what its window and masks let through, whose state it gives, and that it copies none."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache

from unit.runtime.backend.test_kv import DIM, HEADS, store, write


def test_a_window_bounds_what_is_seen_not_what_is_kept() -> None:
    slots = store(RotatingKVCache(max_size=4))
    slots.start(0, 9)
    keys, _ = write(slots, 0, 0, [float(i) for i in range(9)])
    assert keys.shape[2] == 9
    (cache,) = slots.row_view(0, 9, 1)
    new = mx.full((1, HEADS, 1, DIM), 9.0)
    keys, _ = cache.update_and_fetch(new, new)
    assert cache.make_mask(1) is None
    assert keys[0, 0, :, 0].tolist() == [6, 7, 8, 9]
    slots.truncate(0, 5)
    keys, _ = write(slots, 0, 5, [50])
    assert keys[0, 0, :, 0].tolist() == [2, 3, 4, 50]


@pytest.mark.parametrize(("window", "count"), [(None, 1), (4, 1), (4, 3)])
def test_masks_are_those_of_one_stream(window: int | None, count: int) -> None:
    """Row views against mlx-lm's caches, which hold as many tokens."""
    for length in range(1, 12):
        theirs: Any = KVCache() if window is None else RotatingKVCache(max_size=window)
        slots = store(KVCache() if window is None else RotatingKVCache(max_size=window))
        slots.start(0, length)
        old = mx.zeros((1, HEADS, length, DIM))
        theirs.update_and_fetch(old, old)
        write(slots, 0, 0, [0.0] * length)
        (ours,) = slots.row_view(0, length, count)
        assert ours.offset == theirs.offset == length
        a = ours.make_mask(count)
        b = theirs.make_mask(count, return_array=False, window_size=window)
        if isinstance(a, mx.array) and isinstance(b, mx.array):
            # Ours fetches the window only; theirs has an equal or longer slab.
            assert a.sum(axis=-1).tolist() == b.sum(axis=-1).tolist()
        else:
            assert a is b or a == b


def test_state_of_idle_and_of_fresh_rows() -> None:
    slots = store(ArraysCache(1))
    for row in (0, 1, 2):
        slots.start(row, 1)
        (cache,) = slots.row_view(row, 0, 1)
        assert cache[0] is None and cache.empty()
        cache[0] = mx.full((1, 3), row + 1.0)
        assert cache[0].tolist() == [[row + 1.0] * 3]
    (cache,) = slots.batch_view({0: 1, 2: 1}, 3)
    assert cache[0].tolist() == [[1.0] * 3, [2.0] * 3, [3.0] * 3]
    cache[0] = cache[0] * 10
    assert cache[0].tolist() == [[10.0] * 3, [2.0] * 3, [30.0] * 3]
    slots.free(2)
    slots.start(2, 1)
    (cache,) = slots.row_view(2, 0, 1)
    assert cache[0] is None, "the sequence before it left its state in the slot"


def test_no_write_copies_a_slab() -> None:
    """Peak memory over a step stays far under a second slab."""
    slots = store(KVCache(), rows=4)
    for row in range(4):
        slots.start(row, 4096)
        write(slots, row, 0, [1.0] * 64)
    mx.eval(slots.arrays())
    slab_bytes = slots.arrays()[0].nbytes
    active = mx.get_active_memory()
    mx.reset_peak_memory()
    for position in range(64, 70):
        (cache,) = slots.batch_view(dict.fromkeys(range(4), position), 4)
        new = mx.ones((4, HEADS, 1, DIM))
        read = sum(view.sum() for view in cache.update_and_fetch(new, new))
        mx.eval(read, slots.arrays())
        mx.synchronize()
    assert mx.get_peak_memory() - active < slab_bytes / 2
