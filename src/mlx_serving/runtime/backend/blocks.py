"""Prefix blocks on the device: what rows' layers hold of a few positions, kept for other rows.

A pool is `[blocks, kv_heads, block_tokens, dim]` for each slab of an attention layer, `[blocks, …]` for
each array of a recurrent one: the state after the block's last position. Pools grow with the
highest block in use or, where there is a `Space`, have all blocks and take memory as they are
written. A row copies blocks at its start and publishes what it has computed; between,
attention reads contiguous rows.

As with slabs, no reference to a pool may outlive the call that took it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx

from mlx_serving.runtime.backend.block_file import Array, Layout
from mlx_serving.runtime.backend.space import HOLDERS, Space
from mlx_serving.runtime.core.prefix import pool_blocks

Index = slice | mx.array | tuple[slice, ...]

_TYPES = {
    "F32": mx.float32,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U32": mx.uint32,
    "I32": mx.int32,
    "U8": mx.uint8,
    "I8": mx.int8,
    "BOOL": mx.bool_,
}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}


class BlockLayer(Protocol):
    """A layer whose rows can be cut into blocks."""

    def to_blocks(self, row: int, start: int, count: int, size: int) -> list[mx.array | None]:
        """Of `count` blocks of `size` positions from `start` on: `[count, …]` each."""
        ...

    def from_blocks(self, row: int, parts: Sequence[mx.array | None]) -> None:
        """Begin the row with what `to_blocks` gave."""
        ...


class BlockPool:
    """At most `capacity` blocks of `size` positions of every layer."""

    def __init__(
        self, layers: Sequence[BlockLayer], capacity: int, size: int, space: Space | None = None
    ) -> None:
        self.capacity = capacity
        self.size = size
        self._layers = layers
        self._pools: list[list[mx.array | None]] = [[] for _ in layers]
        self._space = space
        self._written = 0
        """Blocks up to the highest that was."""
        if space is not None:
            HOLDERS.add(self)

    @property
    def arrays(self) -> list[mx.array]:
        return [pool for pools in self._pools for pool in pools if pool is not None]

    def publish(self, row: int, start: int, blocks: Sequence[int]) -> None:
        """Copy a row's positions from `start` on into blocks, in order."""
        for layer, pools in zip(self._layers, self._pools, strict=True):
            parts = layer.to_blocks(row, start, len(blocks), self.size)
            pools += [None] * (len(parts) - len(pools))
            for i, part in enumerate(parts):
                if part is not None:
                    pools[i] = self._put(self._fitted(pools[i], part, max(blocks)), blocks, part)

    def copy(self, row: int, blocks: Sequence[int]) -> None:
        """Begin a row with blocks, in order."""
        index = _index(blocks)
        for layer, pools in zip(self._layers, self._pools, strict=True):
            layer.from_blocks(row, [None if p is None else p[index] for p in pools])

    def copy_out(self, blocks: Sequence[int]) -> tuple[Layout, mx.array]:
        """Blocks as bytes, `[blocks, bytes of a block]`, and what they are."""
        index, count = _index(blocks), len(blocks)
        layout: list[Array] = []
        parts: list[mx.array] = []
        for layer, pools in enumerate(self._pools):
            for i, pool in enumerate(pools):
                if pool is not None:
                    layout.append(Array(layer, i, _NAMES[pool.dtype], pool.shape[1:]))
                    parts.append(pool[index].reshape(count, -1).view(mx.uint8))
        return tuple(layout), mx.concatenate(parts, axis=1)

    def fill(self, blocks: Sequence[int], layout: Layout, data: mx.array) -> None:
        """Put back what `copy_out` gave."""
        count, start = len(blocks), 0
        for array in layout:
            end = start + array.nbytes
            pools = self._pools[array.layer]
            pools += [None] * (array.part + 1 - len(pools))
            part = data[:, start:end].view(_TYPES[array.dtype]).reshape(count, *array.shape)
            fitted = self._fitted(pools[array.part], part, max(blocks))
            pools[array.part] = self._put(fitted, blocks, part)
            start = end

    def keep(self, blocks: Sequence[int]) -> None:
        """Keep these blocks, as 0, 1, …, and give the others' memory back."""
        if not blocks:
            self.drop()
            return
        index = mx.array(list(blocks), dtype=mx.int32)
        self._written = len(blocks)
        for pools in self._pools:
            for i, pool in enumerate(pools):
                if pool is not None:
                    pools[i] = self._chosen(pool, index)

    def _chosen(self, pool: mx.array, index: mx.array) -> mx.array:
        chosen = pool[index]
        if self._space is not None:
            reserved = self._space.reserve(pool.shape, pool.dtype)
            chosen = self._space.put(reserved, chosen, range(index.size))
        mx.eval(chosen)
        return chosen

    def drop(self) -> None:
        self._pools = [[] for _ in self._layers]
        self._written = 0

    @property
    def unwritten_bytes(self) -> int:
        spare = self.capacity - self._written
        return spare * sum(pool.nbytes // pool.shape[0] for pool in self.arrays)

    def _put(self, pool: mx.array, blocks: Sequence[int], part: mx.array) -> mx.array:
        if self._space is not None:
            return self._space.put(pool, part, blocks)
        return place(pool, _index(blocks), part)

    def _fitted(self, pool: mx.array | None, part: mx.array, highest: int) -> mx.array:
        if self._space is not None:
            self._written = max(self._written, highest + 1)
            if pool is None:
                return self._space.reserve((self.capacity, *part.shape[1:]), part.dtype)
            return pool
        held = 0 if pool is None else pool.shape[0]
        if pool is not None and highest < held:
            return pool
        room = max(held, pool_blocks(highest + 1, self.capacity))
        grown = mx.zeros((room, *part.shape[1:]), part.dtype)
        if pool is not None:
            grown[:held] = pool
        return grown


def place(target: mx.array, index: Index, value: mx.array) -> mx.array:
    """`target[index] = value`, in memory of its own. Written whole, an array would become the value
    itself, here a view of a slab or of a pool: kernels that write in place would then write both."""
    target[index] = value + 0 if value.shape == target.shape else value
    return target


def _index(blocks: Sequence[int]) -> slice | mx.array:
    """Neighbouring blocks are copied as one."""
    first, last = blocks[0], blocks[-1]
    if list(blocks) == list(range(first, last + 1)):
        return slice(first, last + 1)
    return mx.array(list(blocks), dtype=mx.int32)
