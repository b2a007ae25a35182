"""Whose sequences go before those of their class for a while: a remedy for a service level of some requests
only."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_serving.traffic.slo import Objective
from mlx_serving.traffic.source import Ask
from mlx_serving.types import Priority


class Favour:
    """`objectives`: each has the requests that it is about go one class higher. They count as what they
    asked for in every other respect, the levels' own included."""

    def __init__(self) -> None:
        self.objectives: Sequence[Objective] = ()

    def priority(self, ask: Ask) -> Priority:
        steps = sum(o.about(ask.model_id, ask.priority, ask.turn.client) for o in self.objectives)
        return Priority(max(Priority.CRITICAL, ask.priority - steps)) if steps else ask.priority
