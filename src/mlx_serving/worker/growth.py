"""Whether a worker has grown so large that another one should take its place.

What leaks in it, or in what it runs, goes with the process. A limit below what its models need must not
have it replaced over and over: each replacement that comes too soon doubles the age of the next.
"""

from __future__ import annotations

LEAST_AGE_S = 60.0
"""A worker is not replaced for its size before it has served so long."""
MOST_AGE_S = 3600.0


class Growth:
    """`limit_bytes`: of the resident set; 0: none."""

    def __init__(self, limit_bytes: int = 0, least_age_s: float = LEAST_AGE_S) -> None:
        self.limit_bytes = limit_bytes
        self._first_age_s = self.least_age_s = least_age_s

    def outgrown(self, rss_bytes: int, age_s: float) -> bool:
        """Whether to replace a worker that has served for so long."""
        return 0 < self.limit_bytes < rss_bytes and age_s >= self.least_age_s

    def replaced(self, age_s: float) -> None:
        """It is being replaced for its size, at that age."""
        soon = age_s < 2 * self.least_age_s
        self.least_age_s = min(MOST_AGE_S, 2 * self.least_age_s) if soon else self._first_age_s
