"""What requests of the last seconds came to: how many there were, how many missed a promise, and the
percentiles of a figure."""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass, field

BUCKETS = 30
ACCURACY = 0.02
"""A percentile is told to so much of itself: figures are counted by size, as DDSketch does."""
_GAMMA = (1 + ACCURACY) / (1 - ACCURACY)
_LEAST = 1e-3
"""Smaller figures count as this one."""


@dataclass(slots=True)
class _Bucket:
    index: int
    requests: int = 0
    misses: int = 0
    sizes: Counter[int] = field(default_factory=Counter)


class Window:
    """The last `length_s` seconds, in a fixed number of buckets."""

    def __init__(self, length_s: float) -> None:
        self._bucket_s = length_s / BUCKETS
        self._buckets: deque[_Bucket] = deque(maxlen=BUCKETS)

    def add(self, now_s: float, missed: bool, figure: float | None = None) -> None:
        index = int(now_s / self._bucket_s)
        if not self._buckets or self._buckets[-1].index != index:
            self._buckets.append(_Bucket(index))
        bucket = self._buckets[-1]
        bucket.requests += 1
        bucket.misses += missed
        if figure is not None:
            bucket.sizes[math.ceil(math.log(max(figure, _LEAST)) / math.log(_GAMMA))] += 1

    def counts(self, now_s: float) -> tuple[int, int]:
        """(requests, misses)"""
        live = self._live(now_s)
        return sum(b.requests for b in live), sum(b.misses for b in live)

    def percentile(self, now_s: float, share: float) -> float | None:
        """What `share` of the figures stay below; None: there are none."""
        sizes: Counter[int] = Counter()
        for bucket in self._live(now_s):
            sizes.update(bucket.sizes)
        rank = share * (sizes.total() - 1)
        for size in sorted(sizes):
            rank -= sizes[size]
            if rank < 0:
                return 2 * _GAMMA**size / (_GAMMA + 1)
        return None

    def _live(self, now_s: float) -> list[_Bucket]:
        oldest = int(now_s / self._bucket_s) - BUCKETS
        return [bucket for bucket in self._buckets if bucket.index > oldest]
