"""The queue of sequences without a row, in order of class and arrival."""

from __future__ import annotations

import heapq

from mlx_serving.runtime.core.sequence import Sequence, Status

_SMALL = 64


class WaitingQueue:
    """A heap with lazy removal: a paused, cancelled or finished sequence is dropped when it comes
    to the front, so leaving costs nothing. It is compacted before such entries outnumber the rest."""

    __slots__ = ("_heap", "bound")

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Sequence]] = []
        self.bound = _SMALL
        """Entries at which it is compacted."""

    def __len__(self) -> int:
        """Entries, stale ones included."""
        return len(self._heap)

    def push(self, seq: Sequence) -> None:
        assert seq.status is Status.WAITING and not seq.queued
        if len(self._heap) >= self.bound:
            self._compact()
        seq.queued = True
        heapq.heappush(self._heap, (*seq.order, seq))

    def peek(self) -> Sequence | None:
        """The first that may be admitted."""
        while self._heap:
            seq = self._heap[0][2]
            if _waits(seq):
                return seq
            self.pop()
        return None

    def pop(self) -> Sequence:
        seq = heapq.heappop(self._heap)[2]
        seq.queued = False
        return seq

    def _compact(self) -> None:
        for entry in self._heap:
            entry[2].queued = _waits(entry[2])
        self._heap = [entry for entry in self._heap if entry[2].queued]
        heapq.heapify(self._heap)
        self.bound = max(_SMALL, 2 * len(self._heap))


def _waits(seq: Sequence) -> bool:
    return seq.status is Status.WAITING and not seq.paused
