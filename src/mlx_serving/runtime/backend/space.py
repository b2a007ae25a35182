"""Arrays that take memory a page at a time, as they are written.

MLX's allocator counts them whole: who has some says what was not written (`Holder`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol
from weakref import WeakSet

import mlx.core as mx


class Space(Protocol):
    """See `runtime.native.ops`, which has these."""

    def can_reserve(self, nbytes: int, pieces: int, /) -> bool: ...
    def reserve(self, shape: Sequence[int], dtype: mx.Dtype, /) -> mx.array: ...
    def give_back(self, slabs: Sequence[mx.array], row: int, /) -> list[mx.array]: ...
    def put(self, target: mx.array, value: mx.array, rows: Sequence[int], /) -> mx.array: ...


class Holder(Protocol):
    @property
    def unwritten_bytes(self) -> int:
        """Of its arrays, a page here or there aside."""
        ...


HOLDERS: WeakSet[Holder] = WeakSet()


def unwritten_bytes() -> int:
    """What such arrays do not take, all together."""
    return sum(holder.unwritten_bytes for holder in list(HOLDERS))
