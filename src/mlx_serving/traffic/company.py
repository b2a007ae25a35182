"""What a request meets in its worker: how much of its time other models' steps took, and how many
sequences of its own model it shared steps with.

Models of one worker take turns, and the rows of one model share a step; so of two variants with unequal
shares of the traffic, the rarer one's requests more often have a step to themselves, and more often wait
for the other's. That is no property of the variant, and must not be compared (`rollout.stratum`).
"""

from __future__ import annotations

from dataclasses import dataclass

from mlx_serving.telemetry.events import Company, Met
from mlx_serving.worker.wire import StepStats


@dataclass(slots=True)
class _Steps:
    """A model's, since the beginning."""

    count: int = 0
    sequences: int = 0
    """Added up over them."""
    waiting: int = 0
    """The same of those without a row."""
    own_ms: float = 0.0


class Companies:
    """Counts every step of the worker's models."""

    def __init__(self) -> None:
        self._models: dict[str, _Steps] = {}
        self._all_ms = 0.0

    def observe(self, stats: StepStats) -> None:
        steps = self._models.setdefault(stats.model_id, _Steps())
        steps.count += 1
        # Those that a step ended no longer have a row, and shared it nevertheless.
        steps.sequences += max(1, stats.running, stats.decode_rows)
        steps.waiting += stats.waiting
        steps.own_ms += stats.own_ms
        self._all_ms += stats.own_ms

    def meet(self, model_id: str) -> Meeting:
        """For a request that begins now."""
        return Meeting(self, model_id)

    def at(self, model_id: str) -> tuple[int, int, int, float]:
        """A model's steps, the sequences in them and beside them, and milliseconds of other models' steps
        so far."""
        steps = self._models.setdefault(model_id, _Steps())
        return steps.count, steps.sequences, steps.waiting, self._all_ms - steps.own_ms


class Meeting:
    """One request's, while it runs."""

    def __init__(self, companies: Companies, model_id: str) -> None:
        self._companies = companies
        self._model_id = model_id
        self._since = companies.at(model_id)
        self._first: Met | None = None

    def answered(self) -> None:
        """It has its first token. Up to then whoever waits for a row with it is company as well."""
        self._first = self._met(waiting=True)
        self._since = self._companies.at(self._model_id)

    def company(self) -> Company | None:
        """At its end; None: it had no token."""
        return None if self._first is None else Company(self._first, self._met())

    def _met(self, waiting: bool = False) -> Met:
        now = self._companies.at(self._model_id)
        steps, running, beside, others_ms = (b - a for a, b in zip(self._since, now, strict=True))
        sequences = running + beside if waiting else running
        return Met(others_ms, sequences / steps if steps else 1.0)
