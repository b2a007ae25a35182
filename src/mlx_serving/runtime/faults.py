"""Faults to order, for tests and rehearsals: one model is made slow, the others in its worker are not."""

from __future__ import annotations

import math

from mlx_serving import clock


class Drag:
    """Puts off each step of a model until `slow_s` after its last one ended. The loop's thread does not
    wait for it: it serves the other models meanwhile."""

    def __init__(self, slow_s: float, now: clock.Clock) -> None:
        self._slow_s = slow_s
        self._now = now
        self._due_s = -math.inf
        self.rest_s = math.inf
        """Until the step that was put off is due; inf: none was."""

    def holds(self) -> bool:
        """Whether the next step has to wait."""
        left_s = self._due_s - self._now() if self._slow_s else 0.0
        self.rest_s = left_s if left_s > 0 else math.inf
        return left_s > 0

    def stepped(self) -> None:
        if self._slow_s:
            self._due_s = self._now() + self._slow_s
