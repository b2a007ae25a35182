"""KV and recurrent state of every sequence in flight: row slabs under mlx-lm's cache interface.

A slab is `[slots, kv_heads, capacity, head_dim]`; a sequence owns one row of every layer's slab. Where
there is a `Space`, slabs have all rows at full width and take memory as rows are written.
`Rows` holds what all layers share: lengths, the slabs' size, and the view that the next forward
pass takes of them. A view is one row (`RowView`: integer offset, masks as for a single stream) or
the dense prefix of rows (`BatchView`: a device array of offsets, a mask a row). The layers stand in
for the cache objects that `make_prompt_cache(model)` describes, so model files run unmodified.

Sliding-window layers keep the whole history under a window mask, so that every layer rolls back by
assigning a length. No reference to a slab may outlive the call that took it: a second one makes the
next write copy the whole slab.

Where attention reads KV: `KVLayer.update_and_fetch`. A kernel that reads and writes slabs in place
takes `native_view`, `native_slabs` and `native_store` instead (`runtime.native.slab.SlabCache`;
`in_place.InPlaceLayer` for models that go layer by layer).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    KVCache,
    RotatingKVCache,
    make_prompt_cache,
)

from mlx_serving.runtime.backend.block_file import Layout
from mlx_serving.runtime.backend.blocks import BlockPool, place
from mlx_serving.runtime.backend.space import HOLDERS, Space
from mlx_serving.runtime.backend.views import BatchView, Mask, Rows, RowView, View
from mlx_serving.types import PrefixReuse


class UnsupportedCache(TypeError):
    """A layer's cache is of a kind that has no row-slot form."""


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


def _adapt(cache: Any, rows: Rows, attention: MakeKVLayer) -> Any:
    # Exact types: a subclass may do more than the class that it refines.
    if type(cache) is KVCache:
        return attention(rows, None)
    if type(cache) is RotatingKVCache:
        if cache.keep:
            raise UnsupportedCache("RotatingKVCache that keeps its first tokens")
        return attention(rows, cache.max_size)
    if type(cache) is ArraysCache:
        return StateLayer(rows, len(cache.cache))
    if type(cache) is CacheList:
        return CacheList(*(_adapt(c, rows, attention) for c in cache.caches))
    raise UnsupportedCache(type(cache).__name__)


def _flatten(caches: Sequence[Any]) -> list[Layer]:
    flat: list[Layer] = []
    for cache in caches:
        if isinstance(cache, CacheList):
            flat += _flatten(cache.caches)
        elif cache is not None:
            flat.append(cache)
    return flat


class KVStore(Protocol):
    """Where sequences' KV and state live. The runner asks it for a cache list per forward pass."""

    batched: bool
    """`batch_view` works; otherwise each row needs a forward pass of its own."""
    ragged: bool
    """`batch_view` takes more than one position of a row."""
    prefix_reuse: PrefixReuse
    """`none`: `open_pool` and what follows from it never happen."""

    def start(self, row: int, length: int, /) -> None: ...
    def free(self, row: int) -> None: ...
    def move(self, source: int, target: int) -> None: ...
    def truncate(self, row: int, length: int) -> None: ...
    def snapshot(self, row: int) -> Any: ...
    def restore(self, row: int, state: Any) -> None: ...
    def row_view(self, row: int, start: int, count: int) -> list[Any]: ...
    def batch_view(
        self, positions: dict[int, int], rows: int, ahead: Mapping[int, int] = ..., /
    ) -> list[Any]: ...
    def length(self, row: int) -> int: ...
    def arrays(self) -> list[mx.array]: ...
    def bytes_per_token(self) -> int: ...
    def scratch_bytes_per_token(self) -> int: ...
    def set_budget(self, tokens: int, /) -> None: ...
    def reserve(self, space: Space, row_tokens: int, token_bytes: int, /) -> bool: ...
    def open_pool(self, blocks: int, size: int, /) -> None: ...
    def keep_blocks(self, blocks: Sequence[int], /) -> None: ...
    def copy_blocks(self, row: int, blocks: Sequence[int], /) -> None: ...
    def publish(self, row: int, start: int, blocks: Sequence[int], /) -> list[mx.array]: ...
    def copy_out(self, blocks: Sequence[int], /) -> tuple[Layout, mx.array]: ...
    def fill_blocks(self, blocks: Sequence[int], layout: Layout, data: mx.array, /) -> None: ...
    def state_bytes(self) -> int: ...
    def reset(self) -> None: ...


class RowSlots:
    """The store of slabs. Raises UnsupportedCache where a layer's cache has no such form.

    `min_slots` rows are allocated from the start; `mask_rank` 5 is for models whose attention
    scores are `[rows, kv_heads, repeats, queries, keys]`. `attention` is what attention layers keep
    their KV in; `in_place`: kernels read it where it lies.
    """

    batched = True

    def __init__(
        self,
        model: Module,
        max_rows: int,
        *,
        bucket: int = 256,
        min_slots: int = 1,
        mask_rank: int = 4,
        attention: MakeKVLayer = KVLayer,
        in_place: bool = False,
    ) -> None:
        self.rows = Rows(max_rows, bucket, min_slots)
        self.caches = [
            None if c is None else _adapt(c, self.rows, attention) for c in make_prompt_cache(model)
        ]
        self.layers = _flatten(self.caches)
        self._kv_layers = [layer for layer in self.layers if isinstance(layer, KVLayer)]
        recurrent = any(isinstance(layer, StateLayer) for layer in self.layers)
        self.prefix_reuse: PrefixReuse = "snapshots" if recurrent else "blocks"
        self.ragged = in_place and not recurrent
        self.pool = BlockPool(self.layers, 0, 1)
        self._mask_rank = mask_rank

    def start(self, row: int, length: int) -> None:
        """Take an empty row for a sequence of at least `length` tokens."""
        self.rows.used.add(row)
        self.rows.lengths[row] = 0
        self.rows.fit(row, length)

    def free(self, row: int) -> None:
        self.rows.used.discard(row)
        self.rows.lengths[row] = 0
        if self.rows.used:
            self._give_back(row)
        else:
            self._release()

    def _give_back(self, row: int) -> None:
        """The memory that a row's KV took, where rows have memory of their own."""
        space = self.rows.space
        layers = [layer for layer in self._kv_layers if not layer.empty()]
        if space is None or not layers:
            return
        slabs = [slab for layer in layers for slab in layer.arrays]
        for layer in layers:
            layer.drop()
        slabs = space.give_back(slabs, row)
        # Now, so that the next write finds slabs that nothing else refers to.
        mx.async_eval(slabs)
        for i, layer in enumerate(layers):
            layer.native_store(*slabs[2 * i : 2 * i + 2])

    def move(self, source: int, target: int) -> None:
        """Copy one row over another. The copies exist before a slab is written: while somebody has yet
        to read it, a write takes a second slab."""
        rows = self.rows
        rows.fit(target, rows.lengths[source])
        copies = [layer.copy(source) for layer in self.layers]
        mx.eval(copies)
        for layer, parts in zip(self.layers, copies, strict=True):
            layer.paste(target, parts)
        rows.lengths[target], rows.lengths[source] = rows.lengths[source], 0
        rows.used.discard(source)
        rows.used.add(target)
        self._give_back(source)

    def truncate(self, row: int, length: int) -> None:
        """Forget a row's tokens from `length` on. Recurrent layers also need `restore`."""
        assert length <= self.rows.lengths[row]
        self.rows.lengths[row] = length

    def snapshot(self, row: int) -> tuple[int, list[list[mx.array | None]]]:
        """A row's length and recurrent state; its KV is not copied."""
        return self.rows.lengths[row], [layer.snapshot(row) for layer in self.layers]

    def restore(self, row: int, state: tuple[int, list[list[mx.array | None]]]) -> None:
        length, layers = state
        self.rows.lengths[row] = length
        for layer, saved in zip(self.layers, layers, strict=True):
            layer.restore(row, saved)

    def row_view(self, row: int, start: int, count: int) -> list[Any]:
        """Caches for a forward pass `[1, count]` over one row, which it lengthens."""
        assert start == self.rows.lengths[row], (row, start, self.rows.lengths[row])
        self.rows.fit(row, start + count)
        self.rows.lengths[row] = start + count
        self.rows.view = RowView(row, start, count)
        return self.caches

    def batch_view(
        self, positions: dict[int, int], rows: int, ahead: Mapping[int, int] = MappingProxyType({})
    ) -> list[Any]:
        """Caches for a forward pass `[rows, 1]` that lengthens the rows in `positions` by one.

        A row in `ahead` is lengthened by so many more: its line is that of the last position, and
        `[rows + the others, 1]` have them behind, in the order of `ahead` (if the store is `ragged`).
        """
        assert self.ragged or not ahead
        lengths = self.rows.lengths
        assert all(lengths[row] == p for row, p in positions.items()), (positions, lengths)
        more = [(row, lengths[row] + i) for row, count in ahead.items() for i in range(count)]
        for row, count in ahead.items():
            lengths[row] += count
        # An idle row's garbage needs a place beyond its length too.
        self.rows.fit(rows - 1, max(lengths[:rows]) + 1)
        active = [row in positions for row in range(rows)]
        self.rows.view = BatchView(
            lengths[:rows], active, self.rows.capacity, mask_rank=self._mask_rank, more=more
        )
        for row in positions:
            lengths[row] += 1
        return self.caches

    def length(self, row: int) -> int:
        return self.rows.lengths[row]

    def arrays(self) -> list[mx.array]:
        """Every slab, for evaluation."""
        return [array for layer in self.layers for array in layer.arrays]

    def bytes_per_token(self) -> int:
        """KV bytes that one token of one row takes; known once a forward pass was built."""
        arrays = [array for layer in self._kv_layers for array in layer.arrays]
        return sum(a.nbytes // (a.shape[0] * a.shape[2]) for a in arrays)

    def scratch_bytes_per_token(self) -> int:
        """What reading one token of one row takes for a while."""
        # MLX begins the next layer's before it has given back the last one's.
        return 2 * max((layer.scratch_bytes_per_token() for layer in self._kv_layers), default=0)

    def set_budget(self, tokens: int) -> None:
        """Hold at most this many row tokens, unless the sequences in flight need more."""
        self.rows.budget_tokens = tokens

    def reserve(self, space: Space, row_tokens: int, token_bytes: int) -> bool:
        """From now on every row has address space for so many tokens, and takes memory as it is
        written. False, and nothing is changed: there is not as much. Not while there are slabs."""
        assert not self.arrays()
        pieces = 2 * len(self._kv_layers)
        if not space.can_reserve(self.rows.max_rows * row_tokens * token_bytes, pieces):
            return False
        self.rows.reserve(space, row_tokens)
        HOLDERS.add(self)
        return True

    @property
    def unwritten_bytes(self) -> int:
        """Of slabs that are address space."""
        rows = self.rows
        slabs = [slab for layer in self._kv_layers for slab in layer.arrays]
        written = sum(rows.lengths[row] for row in rows.used)
        return sum(s.nbytes - s.nbytes // (s.shape[0] * s.shape[2]) * written for s in slabs)

    def open_pool(self, blocks: int, size: int) -> None:
        """Keep so many prefix blocks of `size` positions each."""
        self.pool = BlockPool(self.layers, blocks, size, self.rows.space)

    def keep_blocks(self, blocks: Sequence[int]) -> None:
        """Keep these, as 0, 1, …, and give the memory of the others back."""
        self.pool.keep(blocks)

    def copy_blocks(self, row: int, blocks: Sequence[int]) -> None:
        """Begin an empty row with blocks, in order."""
        assert self.rows.lengths[row] == 0
        self.pool.copy(row, blocks)
        self.rows.lengths[row] = len(blocks) * self.pool.size

    def publish(self, row: int, start: int, blocks: Sequence[int]) -> list[mx.array]:
        """Copy positions of a row into blocks, in order; recurrent state is that after its last one.
        Returns the pool's arrays, for evaluation."""
        end = start + len(blocks) * self.pool.size
        assert end == self.length(row) or (self.prefix_reuse == "blocks" and end < self.length(row))
        self.pool.publish(row, start, blocks)
        return self.pool.arrays

    def copy_out(self, blocks: Sequence[int]) -> tuple[Layout, mx.array]:
        """Copies of blocks as bytes, `[blocks, bytes of a block]`."""
        return self.pool.copy_out(blocks)

    def fill_blocks(self, blocks: Sequence[int], layout: Layout, data: mx.array) -> None:
        """Put back what `copy_out` gave, in an earlier process perhaps."""
        self.pool.fill(blocks, layout, data)
        mx.async_eval(self.pool.arrays)

    def state_bytes(self) -> int:
        """Of one row's recurrent state; known once a forward pass was built."""
        return sum(
            array.nbytes // array.shape[0]
            for layer in self.layers
            if isinstance(layer, StateLayer)
            for array in layer.arrays
        )

    def reset(self) -> None:
        self.rows.used.clear()
        self.rows.lengths = [0] * self.rows.max_rows
        self.pool.drop()
        self._release()

    def _release(self) -> None:
        self.rows.shrink()
        for layer in self.layers:
            layer.drop()
