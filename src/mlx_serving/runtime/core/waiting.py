"""The queue of sequences without a row.

lane      those that have waited too long, the oldest first; they hold `lane_rows` rows at most
classes   critical, high, normal, low; in each the client that was served least; of its
          sequences the one of least rank
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator

from mlx_serving.runtime.core.sequence import Sequence, Status
from mlx_serving.runtime.core.shares import Shares
from mlx_serving.types import Priority

_SMALL = 64
_Heap = list[tuple[float, int, Sequence]]
"""(rank, arrival, sequence)"""


class WaitingQueue:
    """Heaps with lazy removal: a held, cancelled or finished sequence is dropped when it comes
    to the front, so leaving costs nothing. They are compacted before such entries outnumber the rest.

    `max_wait_s`: how long a sequence waits, from its arrival, before it enters the lane.
    """

    __slots__ = ("_ages", "_classes", "_entries", "_lane", "_max_wait_s", "_room", "bound", "lane_rows")  # fmt: skip

    def __init__(
        self, shares: Shares | None = None, max_wait_s: float = math.inf, lane_rows: int = 1
    ) -> None:
        shares = shares or Shares()
        self._classes = [_Class(shares) for _ in Priority]
        self._lane: _Heap = []
        self._ages: _Heap = []
        """By arrival: who enters the lane next."""
        self._max_wait_s = max_wait_s
        self.lane_rows = self._room = lane_rows
        self._entries = 0
        self.bound = _SMALL
        """Entries at which it is compacted."""

    def __len__(self) -> int:
        """Entries, stale ones included."""
        return self._entries

    def advance(self, now_s: float, rows: Iterable[Sequence]) -> None:
        """Time has passed: some have waited too long."""
        ages = self._ages
        while ages and ages[0][0] + self._max_wait_s <= now_s:
            seq = heapq.heappop(ages)[-1]
            if seq.status is Status.WAITING and not seq.promoted:
                seq.promoted = seq.queued = True
                heapq.heappush(self._lane, (seq.arrived_s, seq.arrival, seq))
                self._entries += 1
        if self._lane:
            self._room = self.lane_rows - sum(seq.promoted for seq in rows)

    def take_turns(self, max_wait_s: float) -> None:
        """Who waits so long from its arrival enters the lane; who is in it stays."""
        self._max_wait_s = max_wait_s
        self._compact()  # files everybody anew

    def push(self, seq: Sequence) -> None:
        assert seq.status is Status.WAITING and not seq.queued
        if max(self._entries, len(self._ages)) >= self.bound:
            self._compact()
        self._file(seq)

    def hold(self, seq: Sequence, paused: bool, compiling: bool) -> int:
        """Keep it out, or let it in again once nothing holds it; how many more are held then."""
        before, seq.paused, seq.compiling = seq.held, paused, compiling
        if before and _waits(seq) and not seq.queued:
            self.push(seq)
        return seq.held - before

    def peek(self) -> Sequence | None:
        """The first that may be admitted."""
        heap = self._best()
        return heap[0][-1] if heap else None

    def pop(self) -> Sequence:
        """Take what `peek` returns."""
        heap = self._best()
        assert heap
        seq = heapq.heappop(heap)[-1]
        self._entries -= 1
        seq.queued = False
        self._room -= seq.promoted
        return seq

    def _file(self, seq: Sequence) -> None:
        seq.queued = True
        self._entries += 1
        if seq.promoted:
            heapq.heappush(self._lane, (seq.arrived_s, seq.arrival, seq))
            return
        self._classes[seq.priority].push(seq)
        if self._max_wait_s < math.inf:
            heapq.heappush(self._ages, (seq.arrived_s, seq.arrival, seq))

    def _best(self) -> _Heap | None:
        self._entries -= _drop_stale(self._lane, lane=True)
        if self._lane and self._room > 0:
            return self._lane
        for one in self._classes:
            heap, dropped = one.best()
            self._entries -= dropped
            if heap:
                return heap
        return self._lane or None

    def _compact(self) -> None:
        found = {entry[-1]: None for entry in (*self._lane, *_all(self._classes))}
        self._lane.clear()
        self._ages.clear()
        for one in self._classes:
            one.clear()
        self._entries = 0
        for seq in found:
            seq.queued = False
            if _waits(seq):
                self._file(seq)
        self.bound = max(_SMALL, 2 * self._entries)


class _Class:
    """Those of one class: a heap a client, and the clients by how much they were served."""

    def __init__(self, shares: Shares) -> None:
        self._shares = shares
        self.heaps: dict[str | None, _Heap] = {}
        self._clients: list[tuple[float, int, str | None]] = []
        """(served when last looked at, a tie-break, client); what was served only grows."""

    def push(self, seq: Sequence) -> None:
        client = seq.turn.client
        heap = self.heaps.get(client)
        if heap is None:
            heap = self.heaps[client] = []
            heapq.heappush(self._clients, (self._shares.served(client), seq.arrival, client))
        heapq.heappush(heap, (seq.rank, seq.arrival, seq))

    def best(self) -> tuple[_Heap | None, int]:
        """The heap whose first is next, and how many stale entries were dropped on the way."""
        clients, dropped = self._clients, 0
        while clients:
            served, tie, client = clients[0]
            heap = self.heaps[client]
            dropped += _drop_stale(heap, lane=False)
            now = self._shares.served(client)
            if not heap:
                heapq.heappop(clients)
                del self.heaps[client]
            elif now > served:
                heapq.heapreplace(clients, (now, tie, client))
            else:
                return heap, dropped
        return None, dropped

    def clear(self) -> None:
        self.heaps.clear()
        self._clients.clear()


def _all(classes: list[_Class]) -> Iterator[tuple[float, int, Sequence]]:
    for one in classes:
        for heap in one.heaps.values():
            yield from heap


def _drop_stale(heap: _Heap, *, lane: bool) -> int:
    """Of a sequence that has entered the lane, the class's entry is stale, and says nothing of it."""
    dropped = 0
    while heap and (heap[0][-1].promoted != lane or not _waits(heap[0][-1])):
        seq = heapq.heappop(heap)[-1]
        dropped += 1
        if seq.promoted == lane:
            seq.queued = False
    return dropped


def _waits(seq: Sequence) -> bool:
    return seq.status is Status.WAITING and not seq.held
