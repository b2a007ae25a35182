"""KV and recurrent state of every sequence in flight: a row of every layer's slabs each.

`Rows` holds what all layers share: lengths, the slabs' size, and the view that the next forward
pass takes of them. A view is one row (`RowView`: integer offset, masks as for a single stream) or
the dense prefix of rows (`BatchView`: a device array of offsets, a mask a row). The layers
(`kv_layers`) stand in for the cache objects that `make_prompt_cache(model)` describes, so model files
run unmodified.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from mlx_serving.runtime.backend.blocks import BlockPool
from mlx_serving.runtime.backend.kv_layers import KVLayer, Layer, MakeKVLayer, StateLayer
from mlx_serving.runtime.backend.space import HOLDERS, Space
from mlx_serving.runtime.backend.views import BatchView, Rows, RowView
from mlx_serving.types import PrefixReuse


class UnsupportedCache(TypeError):
    """A layer's cache is of a kind that has no row-slot form."""


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
