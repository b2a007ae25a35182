"""What one forward pass sees of the slabs: one row, or the dense prefix of rows.

A view writes new positions, reads what attention needs, and makes the mask to go with it. `Rows`
holds the current view and what outlives it: lengths, and how large the slabs are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask

from mlx_serving.runtime.backend.space import Space

FETCH_TOKENS = 32
"""A batch reads its slabs up to the longest active row, rounded up to this."""

Mask = mx.array | str | None


def round_up(n: int, step: int) -> int:
    return -(-n // step) * step


def _int32(values: Sequence[int]) -> mx.array:
    return mx.array(list(values), dtype=mx.int32)


class RowView:
    """`count` new positions of one row, from `start` on."""

    def __init__(self, row: int, start: int, count: int) -> None:
        self.rows = (row, row + 1)
        self.offset = start
        self.count = count
        self.fetch = start + count
        self.fresh = start == 0
        """The row's recurrent state, if any is left in the slot, is another sequence's."""

    def write(self, slab: mx.array, new: mx.array) -> None:
        first, last = self.rows
        slab[first:last, :, self.offset : self.offset + self.count] = new

    def read(self, slab: mx.array, window: int | None) -> mx.array:
        first, last = self.rows
        begin = self.offset - self._kept(window)
        return slab[first:last, :, begin : self.offset + self.count]

    def mask(self, window: int | None, limit: int | None, return_array: bool) -> Mask:
        """As mlx-lm masks one stream whose layer fetches `window` and sees `limit` tokens."""
        kept = self._kept(window)
        if limit is not None and kept + self.count > limit:
            return create_causal_mask(self.count, kept, window_size=limit)
        if self.count == 1:
            return None
        return create_causal_mask(self.count, kept) if return_array else "causal"

    @cached_property
    def indices(self) -> tuple[mx.array, mx.array]:
        """Rows and offsets, int32 `[1]` each, for kernels that read slabs in place."""
        return _int32([self.rows[0]]), _int32([self.offset])

    def get_state(self, slab: mx.array | None) -> mx.array | None:
        if slab is None:
            return None
        first, last = self.rows
        return slab if slab.shape[0] == 1 else slab[first:last]

    def put_state(self, slab: mx.array | None, new: mx.array, slots: int) -> mx.array:
        if slots == 1:
            return new
        if slab is None:
            slab = mx.zeros((slots, *new.shape[1:]), new.dtype)
        first, last = self.rows
        slab[first:last] = new
        return slab

    def _kept(self, window: int | None) -> int:
        return self.offset if window is None else min(self.offset, window - 1)


class BatchView:
    """One new position of each of the rows 0 … len(positions) - 1.

    `more` are lines behind those: single positions of rows, before the row's own in `positions`. Only
    kernels that read slabs in place, by `indices`, know what to do with them. Rows whose `active` is
    False compute garbage: it lands beyond their length, where their own next token overwrites it, and
    their recurrent state stays.
    """

    def __init__(
        self,
        positions: Sequence[int],
        active: Sequence[bool],
        capacity: int,
        *,
        mask_rank: int = 4,
        more: Sequence[tuple[int, int]] = (),
    ) -> None:
        self.rows = (0, len(positions))
        self.count = 1
        self.offset = _int32([*positions, *(position for _, position in more)])
        longest = max((p for p, a in zip(positions, active, strict=True) if a), default=0)
        self.fetch = min(capacity, round_up(longest + 1, FETCH_TOKENS))
        self.fresh = False
        self._lines = _int32([*range(len(positions)), *(row for row, _ in more)])
        self._is_active = active
        self._mask_rank = mask_rank
        self._masks: dict[int | None, mx.array] = {}

    def write(self, slab: mx.array, new: mx.array) -> None:
        rows, positions = self._places
        slab[rows, :, positions] = new.transpose(0, 2, 1, 3)

    def read(self, slab: mx.array, _window: int | None) -> mx.array:
        return slab[: self.rows[1], :, : self.fetch]

    def mask(self, _window: int | None, limit: int | None, _return_array: bool) -> Mask:
        if limit not in self._masks:
            keys = mx.arange(self.fetch, dtype=mx.int32)
            queries = self.offset[:, None, None]
            mask = keys <= queries
            if limit is not None:
                mask = mask & (keys > queries - limit)
            heads = (1,) * (self._mask_rank - 3)
            self._masks[limit] = mask.reshape(mask.shape[0], *heads, *mask.shape[1:])
        return self._masks[limit]

    @cached_property
    def indices(self) -> tuple[mx.array, mx.array]:
        """Rows and offsets, int32 `[lines]` each, for kernels that read slabs in place."""
        return self._lines, self.offset

    @cached_property
    def _places(self) -> tuple[mx.array, mx.array]:
        """The same, `[lines, 1]` each."""
        return self._lines[:, None], self.offset[:, None]

    @cached_property
    def _active(self) -> mx.array | None:
        """None: all rows are."""
        return None if all(self._is_active) else mx.array(list(self._is_active))

    def get_state(self, slab: mx.array | None) -> mx.array | None:
        if slab is None or slab.shape[0] == self.rows[1]:
            return slab
        return slab[: self.rows[1]]

    def put_state(self, slab: mx.array | None, new: mx.array, slots: int) -> mx.array:
        if self._active is not None and slab is not None:
            active = self._active.reshape(-1, *(1,) * (new.ndim - 1))
            new = mx.where(active, new, slab[: self.rows[1]])
        if self.rows[1] == slots:
            return new
        if slab is None:
            slab = mx.zeros((slots, *new.shape[1:]), new.dtype)
        slab[: self.rows[1]] = new
        return slab


View = RowView | BatchView


class Rows:
    """What all layers share: each row's length, the slabs' size, the view of the next forward.

    Slabs are as large as the rows in use need, every row as wide as the longest, and are copied when
    that changes. With a `space` they have all rows at full width from the start, never move, and a
    row takes the memory of its own length.
    """

    def __init__(self, max_rows: int, bucket: int, min_slots: int = 1) -> None:
        self.max_rows = max_rows
        self.bucket = bucket
        self.min_slots = min_slots
        self.lengths = [0] * max_rows
        self.used: set[int] = set()
        self.slots = min_slots
        self.capacity = bucket
        self.budget_tokens: int | None = None
        """Slots are doubled, and keep what the longest sequence needed, only up to this."""
        self.space: Space | None = None
        self.view: View = RowView(0, 0, 1)

    def fit(self, row: int, length: int) -> None:
        """Make the slabs large enough for `length` tokens in `row`; layers follow at next use."""
        while self.slots <= row:
            self.slots = min(self.max_rows, self.slots * 2)
        if self.space is not None:
            assert length <= self.capacity, (length, self.capacity)
            return
        self.capacity = max(self.capacity, round_up(length, self.bucket))
        if self.budget_tokens is not None and self.slots * self.capacity > self.budget_tokens:
            longest = max(length, *(self.lengths[r] for r in self.used), 0)
            self.slots = max(self.min_slots, row + 1, *(r + 1 for r in self.used))
            self.capacity = round_up(longest, self.bucket)

    def shrink(self) -> None:
        self.slots = self.min_slots
        if self.space is None:
            self.capacity = self.bucket

    def reserve(self, space: Space, row_tokens: int) -> None:
        """Before there are slabs."""
        self.space, self.capacity = space, row_tokens

    def new_slab(self, heads: int, dim: int, dtype: mx.Dtype) -> mx.array:
        """`[slots, heads, capacity, dim]`, zeros."""
        if self.space is not None:
            return self.space.reserve((self.max_rows, heads, self.capacity, dim), dtype)
        return mx.zeros((self.slots, heads, self.capacity, dim), dtype)

    def fits(self, slab: mx.array) -> bool:
        """Whether it has the size that is needed now."""
        slots = self.slots if self.space is None else self.max_rows
        return (slab.shape[0], slab.shape[2]) == (slots, self.capacity)
