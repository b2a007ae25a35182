"""Row slots and the KV memory behind them.

The runner keeps one slab of `rows × row capacity` KV positions. Rows in use are the dense prefix
0..n-1. What they hold is a rectangle, every row as wide as the longest one needs, in buckets; or,
where a row's memory is taken as it is written (`Limits.kv_own_rows`), each row's own buckets.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

from mlx_serving.runtime.core.sequence import Sequence


def bucketed(tokens: int, bucket: int) -> int:
    """The row capacity that holds `tokens`: the next multiple of `bucket`."""
    return -(-tokens // bucket) * bucket


def held(lengths: Iterable[int], bucket: int, *, own: bool) -> int:
    """KV tokens that rows of these lengths hold."""
    if own:
        return sum([bucketed(length, bucket) for length in lengths])
    rows = list(lengths)
    return len(rows) * bucketed(max(rows, default=0), bucket)


class Rows:
    """Which sequence has which row.

    Between plans a row may be a hole: its sequence has left, the runner has not been told.
    `settle` gives holes to the sequences that join, fills the rest from the end, and says what
    the runner has to do.
    """

    __slots__ = ("_freed", "_joining", "slots")

    def __init__(self) -> None:
        self.slots: list[Sequence | None] = []
        self._freed: list[int] = []
        self._joining: list[Sequence] = []

    def __len__(self) -> int:
        """Rows in use, those of joining sequences included."""
        return len(self.slots) - len(self._freed) + len(self._joining)

    def __iter__(self) -> Iterator[Sequence]:
        for seq in self.slots:
            if seq is not None:
                yield seq
        yield from self._joining

    @property
    def unsettled(self) -> bool:
        return bool(self._freed or self._joining)

    def join(self, seq: Sequence) -> None:
        """Take a row at the next `settle`."""
        assert seq.row is None
        self._joining.append(seq)

    def release(self, seq: Sequence) -> None:
        row = seq.row
        assert row is not None and self.slots[row] is seq
        self.slots[row] = seq.row = None
        self._freed.append(row)

    def settle(self) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
        """Make the rows dense again. Returns the rows freed since the last time and the moves
        (from, to), which touch distinct rows. Joining sequences take the lowest holes, so that
        in a full house nothing moves."""
        if not self.unsettled:
            return (), ()
        frees = tuple(sorted(self._freed))
        holes = deque(frees)
        for seq in self._joining:
            if holes:
                self._place(seq, holes.popleft())
            else:
                self.slots.append(None)
                self._place(seq, len(self.slots) - 1)
        self._freed.clear()
        self._joining.clear()
        return frees, tuple(self._close(holes))

    def _close(self, holes: deque[int]) -> Iterator[tuple[int, int]]:
        while holes:
            last = self.slots.pop()
            if last is None:
                holes.pop()
                continue
            assert last.row == len(self.slots)
            yield last.row, holes[0]
            self._place(last, holes.popleft())

    def _place(self, seq: Sequence, row: int) -> None:
        self.slots[row] = seq
        seq.row = row

    def clear(self) -> None:
        """The runner has forgotten every row."""
        for seq in self:
            seq.row = None
        self.slots.clear()
        self._freed.clear()
        self._joining.clear()
