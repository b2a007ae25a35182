"""What one layer keeps of every row, under mlx-lm's cache interface: keys and values, or recurrent state.

A slab is `[slots, kv_heads, capacity, head_dim]`; a sequence owns one row of every layer's slab. Where
there is a `Space`, slabs have all rows at full width and take memory as rows are written. What a
forward pass sees of a slab is the view's business (`views`).

Sliding-window layers keep the whole history under a window mask, so that every layer rolls back by
assigning a length. No reference to a slab may outlive the call that took it: a second one makes the
next write copy the whole slab.

Where attention reads KV: `KVLayer.update_and_fetch`. A kernel that reads and writes slabs in place
takes `native_view`, `native_slabs` and `native_store` instead (`runtime.native.slab.SlabCache`;
`in_place.InPlaceLayer` for models that go layer by layer).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache

from mlx_serving.runtime.backend.blocks import place
from mlx_serving.runtime.backend.views import Mask, Rows, View


class KVLayer:
    """One attention layer's keys and values (full, sliding window, or MLA's latent and rope parts).

    Implements what model files use of mlx-lm's KVCache and RotatingKVCache.
    """

    codes: tuple[Any, Any] = (None, None)
    """How slabs of keys and values are quantised, as kernels are told (`native.slab.Codes`)."""

    def __init__(self, rows: Rows, window: int | None = None) -> None:
        self.rows = rows
        self.window = window
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    @property
    def offset(self) -> int | mx.array:
        return self.rows.view.offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write the new positions' `[rows, heads, count, dim]`; return all that the view sees."""
        self.keys = self._fitted(self.keys, keys.shape[1], keys.shape[3], keys.dtype)
        self.values = self._fitted(self.values, values.shape[1], values.shape[3], values.dtype)
        view = self.rows.view
        view.write(self.keys, keys)
        view.write(self.values, values)
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        view = self.rows.view
        assert self.keys is not None and self.values is not None
        return view.read(self.keys, self.window), view.read(self.values, self.window)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Mask:
        assert self.rows.view.count == N
        return self.rows.view.mask(self.window, window_size or self.window, return_array)

    def size(self) -> int:
        return max(self.rows.lengths)

    def empty(self) -> bool:
        return self.keys is None

    @property
    def arrays(self) -> list[mx.array]:
        return [a for a in (self.keys, self.values) if a is not None]

    def copy(self, row: int) -> list[mx.array | None]:
        """What a row holds, in memory of its own."""
        length = self.rows.lengths[row]
        # A view would forbid the write in place.
        return [slab[row : row + 1, :, :length] + 0 for slab in self.arrays if length]

    def paste(self, row: int, parts: list[mx.array | None]) -> None:
        for slab, part in zip(self.arrays, parts, strict=False):
            assert row < slab.shape[0] and part is not None
            slab[row : row + 1, :, : part.shape[2]] = part

    def drop(self) -> None:
        self.keys = self.values = None

    def snapshot(self, _row: int) -> list[mx.array | None]:
        return []

    def restore(self, _row: int, state: list[mx.array | None]) -> None:
        assert not state

    def to_blocks(self, row: int, start: int, count: int, size: int) -> list[mx.array | None]:
        return [
            slab[row, :, start : start + count * size]
            .reshape(slab.shape[1], count, size, slab.shape[3])
            .transpose(1, 0, 2, 3)
            for slab in self.arrays
        ]

    def from_blocks(self, row: int, parts: Sequence[mx.array | None]) -> None:
        if parts:
            keys, values = parts
            self.keys = self._begun(self.keys, row, keys)
            self.values = self._begun(self.values, row, values)

    def _begun(self, slab: mx.array | None, row: int, blocks: mx.array | None) -> mx.array:
        assert blocks is not None
        count, heads, size, dim = blocks.shape
        history = blocks.transpose(1, 0, 2, 3).reshape(1, heads, count * size, dim)
        slab = self._fitted(slab, heads, dim, blocks.dtype)
        if self.rows.space is not None:
            return self.rows.space.put(slab, history, [row])
        index = (slice(row, row + 1), slice(None), slice(count * size))
        return place(slab, index, history)

    def scratch_bytes_per_token(self) -> int:
        """What reading one position takes for a while, where it is not read as it is kept."""
        return 0

    def native_view(self) -> tuple[mx.array, mx.array] | None:
        """Rows and offsets of the next forward pass, int32 `[batch]` each."""
        return self.rows.view.indices

    def native_slabs(
        self, kv_heads: int, key_dim: int, value_dim: int, dtype: mx.Dtype
    ) -> tuple[mx.array, mx.array]:
        """Hand the slabs over to a kernel that writes them in place."""
        keys = self._fitted(self.keys, kv_heads, key_dim, dtype)
        values = self._fitted(self.values, kv_heads, value_dim, dtype)
        self.drop()
        return keys, values

    def native_store(self, keys: mx.array, values: mx.array) -> None:
        self.keys, self.values = keys, values

    def _fitted(self, slab: mx.array | None, heads: int, dim: int, dtype: mx.Dtype) -> mx.array:
        if slab is None:
            return self.rows.new_slab(heads, dim, dtype)
        if self.rows.fits(slab):
            return slab
        slots, capacity = self.rows.slots, self.rows.capacity
        rows, tokens = min(slots, slab.shape[0]), min(capacity, slab.shape[2])
        fitted = mx.zeros((slots, slab.shape[1], capacity, slab.shape[3]), slab.dtype)
        fitted[:rows, :, :tokens] = slab[:rows, :, :tokens]
        # Now, so that no two layers' old and new slabs are held at once.
        mx.eval(fitted)
        return fitted


class StateLayer(ArraysCache):
    """One recurrent layer's state, `[slots, …]` an array; idle rows keep theirs."""

    def __init__(self, rows: Rows, size: int) -> None:
        super().__init__(size)
        self.cache: list[mx.array | None] = [None] * size  # type: ignore[assignment]
        self.rows = rows
        self._written: list[View | None] = [None] * size

    def __getitem__(self, index: int) -> mx.array | None:
        view = self.rows.view
        if view.fresh and self._written[index] is not view:
            return None
        return view.get_state(self._fitted(index))

    def __setitem__(self, index: int, new: mx.array) -> None:
        view = self.rows.view
        slab = self._fitted(index)
        self.cache[index] = view.put_state(slab, new, self.rows.slots)
        self._written[index] = view

    def make_mask(self, N: int) -> None:
        """No padding ever: prefill is unpadded, and idle rows' results are thrown away."""

    def advance(self, N: int) -> None:
        pass

    def empty(self) -> bool:
        return self.cache[0] is None or self.rows.view.fresh

    @property
    def arrays(self) -> list[mx.array]:
        return [a for a in self.cache if a is not None]

    def copy(self, row: int) -> list[mx.array | None]:
        return self.snapshot(row)

    def paste(self, row: int, parts: list[mx.array | None]) -> None:
        self.restore(row, parts)

    def drop(self) -> None:
        self.cache = [None] * len(self.cache)

    def snapshot(self, row: int) -> list[mx.array | None]:
        """A copy of the row's state, for `restore` or for another row."""
        slabs = [self._fitted(i) for i in range(len(self.cache))]
        return [None if s is None else mx.array(s[row : row + 1]) + 0 for s in slabs]

    def restore(self, row: int, state: list[mx.array | None]) -> None:
        for i, value in enumerate(state):
            if value is not None:
                slab = self._fitted(i)
                if slab is None:
                    slab = mx.zeros((self.rows.slots, *value.shape[1:]), value.dtype)
                self.cache[i] = place(slab, slice(row, row + 1), value)

    def to_blocks(self, row: int, _start: int, count: int, _size: int) -> list[mx.array | None]:
        assert count == 1, "state is there after the last position only"
        slabs = [self._fitted(i) for i in range(len(self.cache))]
        return [None if s is None else s[row : row + 1] for s in slabs]

    def from_blocks(self, row: int, parts: Sequence[mx.array | None]) -> None:
        self.restore(row, [None if part is None else part[-1:] for part in parts])

    def _fitted(self, index: int) -> mx.array | None:
        slab = self.cache[index]
        slots = self.rows.slots
        if slab is not None and slab.shape[0] != slots:
            rows = min(slots, slab.shape[0])
            fitted = mx.zeros((slots, *slab.shape[1:]), slab.dtype)
            fitted[:rows] = slab[:rows]
            self.cache[index] = slab = fitted
        return slab


Layer = KVLayer | StateLayer
MakeKVLayer = Callable[[Rows, int | None], KVLayer]
"""Of what all layers share, and the layer's window."""
