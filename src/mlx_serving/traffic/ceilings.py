"""How much each model takes on at once: who has a say in it, and what the worker is told.

The concurrency limit that is set by hand goes before all else. Without it there is the usual number of
sequences, which remedies lower or raise (`remedies`), and the guard's bound on it (`step_guard`).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from mlx_serving import clock
from mlx_serving.config import Config
from mlx_serving.telemetry.metrics import Metrics
from mlx_serving.traffic.step_guard import (
    WINDOW_STEPS,
    Bypassed,
    Degraded,
    Enabled,
    Seen,
    State,
    step,
)
from mlx_serving.types import ModelInfo
from mlx_serving.worker.port import WorkerClient
from mlx_serving.worker.wire import StepStats, Tune

log = logging.getLogger(__name__)

LEAST_PREFILL_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Wishes:
    """What settings and remedies want of every model."""

    limit: int | None = None
    """By hand."""
    usual: int | None = None
    chunk_halvings: int = 0
    ceiling_steps: int = 0
    """Below 0 a quarter less each, above 0 twice as many each."""


def tuning(info: ModelInfo, wishes: Wishes, guard: State) -> Tune:
    """What a model's worker is told, so that it takes on as much as all allow."""
    most, step_size = info.max_num_seqs, info.prefill_step_size
    if isinstance(guard, Bypassed):
        rows = guard.ceiling
    else:
        usual = most if wishes.usual is None else min(wishes.usual, most)
        rows = _moved(usual, wishes.ceiling_steps)
        if isinstance(guard, Degraded):
            rows = min(rows, guard.ceiling)
    prefill = max(min(LEAST_PREFILL_TOKENS, step_size), step_size >> wishes.chunk_halvings)
    return Tune(
        model_id=info.model_id,
        max_num_seqs=rows if rows < most else None,
        prefill_tokens=prefill if wishes.chunk_halvings else None,
    )


def _moved(rows: int, steps: int) -> int:
    if steps >= 0:
        return rows << steps
    for _ in range(-steps):
        rows = max(1, rows * 3 // 4)
    return rows


@dataclass(slots=True)
class _Model:
    info: ModelInfo
    state: State
    told: Tune
    steps: int = 0
    over: int = 0
    rows: int = 0
    """These three are of the window that is being filled."""


class Ceilings:
    """Args: config: `concurrency_limit`, `usual_num_seqs`, `step_limit_ms`."""

    def __init__(
        self,
        config: Config,
        worker: WorkerClient,
        metrics: Metrics,
        now: clock.Clock = clock.monotonic,
    ) -> None:
        self._worker = worker
        self._metrics = metrics
        self._now = now
        self._models: dict[str, _Model] = {}
        self._wishes = Wishes()
        self._limit_ms = 0.0
        self.configure(config)

    def configure(self, config: Config) -> None:
        """Take over settings, now and whenever they change; the guard then begins anew."""
        self._limit_ms = config.step_limit_ms
        self._wishes = replace(
            self._wishes, limit=config.concurrency_limit, usual=config.usual_num_seqs
        )
        for model in self._models.values():
            model.state = self._initial()
            model.steps = model.over = model.rows = 0
            self._tell(model)

    def tune(self, chunk_halvings: int, ceiling_steps: int) -> None:
        """What remedies want."""
        self._wishes = replace(
            self._wishes, chunk_halvings=chunk_halvings, ceiling_steps=ceiling_steps
        )
        for model in self._models.values():
            self._tell(model)

    def loaded(self, info: ModelInfo) -> None:
        if info.max_num_seqs:  # an encoder has no rows to speak of
            known = self._models.get(info.model_id)
            state = self._initial() if known is None else known.state
            told = Tune(model_id=info.model_id) if known is None else known.told
            model = self._models[info.model_id] = _Model(info, state, told)
            self._tell(model)

    def observe(self, stats: StepStats) -> None:
        """What a step took; called for each."""
        model = self._models.get(stats.model_id)
        if not self._limit_ms or model is None or not stats.decode_rows:
            return
        model.steps += 1
        model.over += stats.step_ms > self._limit_ms
        model.rows = max(model.rows, stats.running)
        if model.steps == WINDOW_STEPS:
            seen = Seen(model.over, model.rows)
            model.steps = model.over = model.rows = 0
            before = model.state
            model.state = step(before, seen, model.info.max_num_seqs, self._now())
            if isinstance(model.state, Degraded) or isinstance(before, Degraded):
                self._tell(model)

    def report(self) -> list[dict[str, object]]:
        """For /health: each model's guard and what it takes on at once. Empty where nothing is to be
        said."""
        return [self._row(model) for model in self._models.values() if self._of_note(model)]

    def _of_note(self, model: _Model) -> bool:
        return bool(self._limit_ms) or model.told != Tune(model_id=model.info.model_id)

    def _row(self, model: _Model) -> dict[str, object]:
        told, info = model.told, model.info
        return {
            "model": info.model_id,
            "guard": model.state.name if self._limit_ms or self._wishes.limit else "off",
            "concurrency": _rows(model),
            "prefill_tokens": told.prefill_tokens or info.prefill_step_size,
        }

    def _initial(self) -> State:
        return Enabled() if self._wishes.limit is None else Bypassed(self._wishes.limit)

    def _tell(self, model: _Model) -> None:
        told, model.told = model.told, tuning(model.info, self._wishes, model.state)
        name, row = model.info.model_id, self._row(model)
        if model.told != told:
            self._worker.tune(model.told)
            line = "%s: at most %d sequences at once, %d tokens of prefill a step; guard: %s"
            level = logging.WARNING if isinstance(model.state, Degraded) else logging.INFO
            log.log(level, line, name, row["concurrency"], row["prefill_tokens"], row["guard"])
        self._metrics.concurrency.labels(name).set(_rows(model))
        self._metrics.guard_degraded.labels(name).set(isinstance(model.state, Degraded))


def _rows(model: _Model) -> int:
    return model.told.max_num_seqs or model.info.max_num_seqs
