"""Which model is asked for after which, learnt from the requests as they come: a table of counts that
decay."""

from __future__ import annotations

from dataclasses import dataclass

DECAY = 0.8
"""What a switch away from a model leaves of those before it: about five are remembered."""
LEAST_SEEN = 1.5
"""Decayed switches below which nothing is guessed: once is no habit."""


@dataclass(frozen=True, slots=True)
class Guess:
    model_id: str
    confidence: float
    """Its share of the decayed switches from the present model."""


class Succession:
    """The present model is that of the last request. Requests of one model in a row count as one."""

    def __init__(self) -> None:
        self._present: str | None = None
        self._switches: dict[str, dict[str, float]] = {}

    def observe(self, model_id: str) -> None:
        """A request for it has begun."""
        before, self._present = self._present, model_id
        if before is None or before == model_id:
            return
        after = self._switches.setdefault(before, {})
        for other in after:
            after[other] *= DECAY
        after[model_id] = after.get(model_id, 0.0) + 1.0

    def guess(self) -> Guess | None:
        """The model that comes after the present one."""
        after = self._switches.get(self._present or "", {})
        seen = sum(after.values())
        if seen < LEAST_SEEN:
            return None
        likeliest = max(after, key=lambda model_id: after[model_id])
        return Guess(likeliest, after[likeliest] / seen)
