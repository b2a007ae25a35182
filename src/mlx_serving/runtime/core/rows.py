"""Row slots and the KV memory behind them.

The runner keeps one slab of `rows × row capacity` KV positions. Rows in use are the dense prefix
0..n-1, and a row is as wide as the longest one needs, in buckets: what is held is a rectangle.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from mlx_serving.runtime.core.sequence import Sequence


def bucketed(tokens: int, bucket: int) -> int:
    """The row capacity that holds `tokens`: the next multiple of `bucket`."""
    return -(-tokens // bucket) * bucket


def rectangle(rows: int, longest: int, bucket: int) -> int:
    """KV tokens that `rows` rows hold when the longest has `longest` positions."""
    return rows * bucketed(longest, bucket)


class Rows:
    """Which sequence has which row.

    Between plans a row may be a hole: its sequence has left, the runner has not been told. A
    start takes the lowest hole; `settle` fills the others from the end and says what to tell.
    """

    __slots__ = ("_freed", "_holes", "slots")

    def __init__(self) -> None:
        self.slots: list[Sequence | None] = []
        self._holes: list[int] = []
        self._freed: list[int] = []

    def __len__(self) -> int:
        """Rows in use."""
        return len(self.slots) - len(self._holes)

    def __iter__(self) -> Iterator[Sequence]:
        return (seq for seq in self.slots if seq is not None)

    @property
    def unsettled(self) -> bool:
        return bool(self._freed)

    def release(self, seq: Sequence) -> None:
        row = seq.row
        assert row is not None and self.slots[row] is seq
        self.slots[row] = seq.row = None
        heapq.heappush(self._holes, row)
        self._freed.append(row)

    def take(self, seq: Sequence) -> None:
        assert seq.row is None
        if self._holes:
            seq.row = heapq.heappop(self._holes)
            self.slots[seq.row] = seq
        else:
            seq.row = len(self.slots)
            self.slots.append(seq)

    def settle(self) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
        """Make the rows dense again. Returns the rows freed since the last time, and the moves
        (from, to), which touch distinct rows. Starts took the lowest holes, so none of them moves."""
        if not self._freed:
            return (), ()
        frees = tuple(self._freed)
        self._freed.clear()
        moves: list[tuple[int, int]] = []
        while self._holes:
            seq = self.slots.pop()
            if seq is None:
                self._holes.remove(len(self.slots))
                continue
            to = heapq.heappop(self._holes)
            assert seq.row == len(self.slots)
            moves.append((seq.row, to))
            self.slots[to] = seq
            seq.row = to
        return frees, tuple(moves)

    def clear(self) -> None:
        """The runner has forgotten every row."""
        for seq in self:
            seq.row = None
        self.slots.clear()
        self._holes.clear()
        self._freed.clear()
