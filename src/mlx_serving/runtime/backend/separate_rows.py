"""Rows whose caches are mlx-lm's own, for models whose caches have no slab form."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx_lm.models.cache import make_prompt_cache

from mlx_serving.runtime.backend.block_file import Layout
from mlx_serving.runtime.backend.kv import UnsupportedCache
from mlx_serving.runtime.backend.space import Space
from mlx_serving.types import PrefixReuse


def _leaves(tree: Any) -> Iterator[mx.array]:
    if isinstance(tree, mx.array):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for branch in tree:
            yield from _leaves(branch)


class SeparateRows:
    """mlx-lm's own caches, a list a row: for models whose caches have no slab form. Decoding then
    costs a forward pass a row."""

    batched = ragged = False
    prefix_reuse: PrefixReuse = "none"

    def __init__(self, model: Module, max_rows: int) -> None:
        self._model = model
        self._caches: list[list[Any] | None] = [None] * max_rows
        self._lengths = [0] * max_rows

    def start(self, row: int, _length: int) -> None:
        self._caches[row] = make_prompt_cache(self._model)
        self._lengths[row] = 0

    def free(self, row: int) -> None:
        self._caches[row] = None
        self._lengths[row] = 0

    def move(self, source: int, target: int) -> None:
        self._caches[target], self._caches[source] = self._caches[source], None
        self._lengths[target], self._lengths[source] = self._lengths[source], 0

    def truncate(self, row: int, length: int) -> None:
        """Raises UnsupportedCache where a layer's cache cannot be trimmed."""
        drop = self._lengths[row] - length
        assert drop >= 0
        caches = self._caches[row]
        assert caches is not None
        if not all(c.is_trimmable() for c in caches):
            raise UnsupportedCache("cannot be trimmed; restore a snapshot")
        for cache in caches:
            cache.trim(drop)
        self._lengths[row] = length

    def snapshot(self, row: int) -> tuple[int, Any]:
        return self._lengths[row], copy.deepcopy(self._caches[row])

    def restore(self, row: int, state: tuple[int, Any]) -> None:
        self._lengths[row], self._caches[row] = state[0], copy.deepcopy(state[1])

    def row_view(self, row: int, start: int, count: int) -> list[Any]:
        assert start == self._lengths[row], (row, start, self._lengths[row])
        self._lengths[row] = start + count
        caches = self._caches[row]
        assert caches is not None
        return caches

    def batch_view(
        self,
        _positions: dict[int, int],
        _rows: int,
        _ahead: Mapping[int, int] = MappingProxyType({}),
    ) -> list[Any]:
        raise UnsupportedCache("no batch over separate rows")

    def length(self, row: int) -> int:
        return self._lengths[row]

    def arrays(self) -> list[mx.array]:
        state = [c.state for caches in self._caches if caches for c in caches if c is not None]
        return list(_leaves(state))

    def bytes_per_token(self) -> int:
        """An estimate: a row's arrays by the tokens that they have room for."""
        total = 0
        caches = next((c for c in self._caches if c), [])
        for cache in caches:
            keys = getattr(cache, "keys", None)
            if isinstance(keys, mx.array):
                total += 2 * keys.nbytes // keys.shape[-2]
        return total

    def scratch_bytes_per_token(self) -> int:
        return 0

    def set_budget(self, _tokens: int) -> None:
        """Caches are as large as their sequences already."""

    def reserve(self, _space: Space, _row_tokens: int, _token_bytes: int) -> bool:
        return False

    def open_pool(self, _blocks: int, _size: int) -> None:
        raise UnsupportedCache("separate rows have no blocks")

    def keep_blocks(self, _blocks: Sequence[int]) -> None:
        raise UnsupportedCache("separate rows have no blocks")

    def copy_blocks(self, _row: int, _blocks: Sequence[int]) -> None:
        raise UnsupportedCache("separate rows have no blocks")

    def publish(self, _row: int, _start: int, _blocks: Sequence[int]) -> list[mx.array]:
        raise UnsupportedCache("separate rows have no blocks")

    def copy_out(self, _blocks: Sequence[int]) -> tuple[Layout, mx.array]:
        raise UnsupportedCache("separate rows have no blocks")

    def fill_blocks(self, _blocks: Sequence[int], _layout: Layout, _data: mx.array) -> None:
        raise UnsupportedCache("separate rows have no blocks")

    def state_bytes(self) -> int:
        return 0

    def reset(self) -> None:
        self._caches = [None] * len(self._caches)
        self._lengths = [0] * len(self._lengths)
