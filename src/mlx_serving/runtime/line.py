"""How long the device was busy with each step, whichever model's it was.

It computes steps in the order in which they were launched, so a step's own time runs from its launch
or from the end of the one before it, and that one may be another model's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from mlx_serving import clock
from mlx_serving.runtime.core.plan import PendingStep, StepPlan, StepResult


@dataclass(slots=True, eq=False)
class Launched:
    plan: StepPlan
    pending: PendingStep
    at_s: float
    own_s: float = 0.0
    """Of the device; known when it is done."""
    done: StepResult | Exception | None = None


class Line:
    """Steps that were launched and not waited for: one for all models of a worker."""

    def __init__(self, now: clock.Clock = clock.monotonic) -> None:
        self._now = now
        self._steps: deque[Launched] = deque()
        self._free_s = 0.0
        """When the device was done with the last one."""

    def join(self, plan: StepPlan, pending: PendingStep) -> Launched:
        step = Launched(plan, pending, self._now())
        self._steps.append(step)
        return step

    def wait(self, step: Launched) -> StepResult:
        """What it came to, once those before it are done too. Raises what its own computation raised."""
        while step.done is None:
            self._settle(self._steps.popleft())
        if isinstance(step.done, Exception):
            raise step.done
        return step.done

    def leave(self, steps: Iterable[Launched]) -> None:
        """Nobody will wait for them."""
        left = set(steps)
        self._steps = deque(step for step in self._steps if step not in left)

    def _settle(self, step: Launched) -> None:
        try:
            step.done = step.pending.wait()
        except Exception as error:  # its own model's, and no other's
            step.done = error
        began_s, self._free_s = max(step.at_s, self._free_s), self._now()
        step.own_s = self._free_s - began_s
