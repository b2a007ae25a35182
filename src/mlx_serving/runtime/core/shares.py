"""How much each client was served, so that the one served least goes first.

Virtual time, as fair queueing has it: a client's counter grows by the tokens computed for it over its
weight. Who comes anew starts at the least counter of those present, so that nobody saves up for later.
"""

from __future__ import annotations

from mlx_serving.runtime.core.sequence import Sequence


class Shares:
    def __init__(self) -> None:
        self._served: dict[str | None, float] = {}
        """By client that has sequences."""
        self._present: dict[str | None, int] = {}
        """Its sequences."""
        self._left: dict[str | None, float] = {}
        """Counters of those who left while others stayed: who comes back at once gains nothing."""

    def served(self, client: str | None) -> float:
        return self._served.get(client, 0.0)

    def enter(self, client: str | None) -> None:
        if client not in self._present:
            floor = min(self._served.values(), default=0.0)
            self._served[client] = max(floor, self._left.pop(client, 0.0))
            self._left = {c: served for c, served in self._left.items() if served > floor}
            self._present[client] = 0
        self._present[client] += 1

    def leave(self, client: str | None) -> None:
        self._present[client] -= 1
        if not self._present[client]:
            del self._present[client]
            self._left[client] = self._served.pop(client)
            if not self._present:
                self._left.clear()

    def charge(self, seq: Sequence) -> None:
        """Its computed positions have advanced. What was copied, and what is computed again after a
        preemption, was no service."""
        new = seq.computed - max(seq.charged, seq.reused)
        if new > 0:
            self._served[seq.turn.client] += new / seq.turn.weight
        seq.charged = max(seq.charged, seq.computed)
