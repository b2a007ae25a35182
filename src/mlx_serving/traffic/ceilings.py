"""How much each model takes on at once: who has a say in it, and what the worker is told.

The concurrency limit that is set by hand goes before all else. Without it there is the usual number of
sequences, set or found (`knee`), which remedies lower or raise (`remedies`), and the guard's bound on it
(`step_guard`).
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field, replace

from mlx_serving import clock
from mlx_serving.config import Config
from mlx_serving.telemetry.metrics import Metrics
from mlx_serving.traffic import knee
from mlx_serving.traffic.slo import Objective, parse
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
CEILING_SETTINGS = ("concurrency_limit", "usual_num_seqs", "step_limit_ms", "find_knee")
"""And `slo`."""


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
    search: knee.State | None = None
    """None: it is not looked for."""
    full: list[knee.Step] = field(default_factory=list)
    """Steps with rows enough, of the window that is being filled."""
    token_ms: float | None = None
    """What a prompt token adds to a step."""


class Ceilings:
    """Args: config: `CEILING_SETTINGS`, `slo`.

    Raises ConfigError for a service level that is none.
    """

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
        self._find_knee = False
        self._tpots: list[Objective] = []
        self.configure(config)

    def configure(self, config: Config) -> None:
        """Take over settings, now and whenever they change; the guard and the search then begin anew."""
        self._limit_ms = config.step_limit_ms
        self._find_knee = config.find_knee and config.concurrency_limit is None
        self._tpots = [o for o in map(parse, config.slo) if o.metric == "tpot"]
        self._wishes = replace(
            self._wishes, limit=config.concurrency_limit, usual=config.usual_num_seqs
        )
        for model in self._models.values():
            model.state = self._initial()
            model.steps = model.over = model.rows = 0
            self._begin_search(model)
            self._tell(model)

    def tune(self, chunk_halvings: int, ceiling_steps: int) -> None:
        """What remedies want."""
        self._wishes = replace(
            self._wishes, chunk_halvings=chunk_halvings, ceiling_steps=ceiling_steps
        )
        for model in self._models.values():
            self._tell(model)

    def loaded(self, info: ModelInfo) -> None:
        # An encoder has no rows to speak of, and an adapter's are its model's.
        if info.max_num_seqs and info.adapter_of is None:
            known = self._models.get(info.model_id)
            state = self._initial() if known is None else known.state
            told = Tune(model_id=info.model_id) if known is None else known.told
            model = self._models[info.model_id] = _Model(info, state, told)
            self._begin_search(model)
            self._tell(model)

    def observe(self, stats: StepStats) -> None:
        """What a step took; called for each."""
        model = self._models.get(stats.model_id)
        if model is None or not stats.decode_rows:
            return
        if self._limit_ms:
            self._guard(model, stats)
        if model.search is not None and model.search.ceiling == _rows(model):
            self._search(model, model.search, stats)

    def _guard(self, model: _Model, stats: StepStats) -> None:
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

    def _search(self, model: _Model, before: knee.State, stats: StepStats) -> None:
        """What other models take of a step would not be less with fewer rows of this one."""
        seen = None
        if knee.is_full(before.ceiling, stats.decode_rows):
            model.full.append((stats.decode_rows, stats.prefill_tokens, stats.own_ms))
            if len(model.full) == knee.WINDOW_STEPS:
                model.token_ms = knee.token_ms(model.full, model.token_ms)
                seen = knee.summary(model.full, model.token_ms)
                model.full.clear()
        if seen is None and isinstance(before, knee.Settled):
            return
        limit_ms = self._longest_ms(model.info.model_id)
        after = knee.step(before, seen, model.info.max_num_seqs, limit_ms, self._now())
        model.search = after
        if after.ceiling != before.ceiling:
            model.full.clear()
            self._tell(model)

    def _longest_ms(self, model_id: str) -> float:
        """Of a step, by service levels and the guard's setting."""
        limits = [o.limit for o in self._tpots if o.model in (None, model_id)]
        return min([*limits, self._limit_ms or math.inf], default=math.inf)

    def _begin_search(self, model: _Model) -> None:
        model.full.clear()
        usual, most = self._wishes.usual, model.info.max_num_seqs
        start = most if usual is None else min(usual, most)
        model.search = knee.Settled(start) if self._find_knee else None

    def report(self) -> list[dict[str, object]]:
        """For /health: each model's guard and what it takes on at once. Empty where nothing is to be
        said."""
        return [self._row(model) for model in self._models.values() if self._of_note(model)]

    def _of_note(self, model: _Model) -> bool:
        if self._limit_ms or model.search is not None:
            return True
        return model.told != Tune(model_id=model.info.model_id)

    def _row(self, model: _Model) -> dict[str, object]:
        told, info = model.told, model.info
        return {
            "model": info.model_id,
            "guard": model.state.name if self._limit_ms or self._wishes.limit else "off",
            "concurrency": _rows(model),
            "prefill_tokens": told.prefill_tokens or info.prefill_step_size,
            **({} if model.search is None else {"knee": type(model.search).__name__.lower()}),
        }

    def _initial(self) -> State:
        return Enabled() if self._wishes.limit is None else Bypassed(self._wishes.limit)

    def _tell(self, model: _Model) -> None:
        wishes = self._wishes
        if model.search is not None:
            wishes = replace(wishes, usual=model.search.ceiling)
        told, model.told = model.told, tuning(model.info, wishes, model.state)
        name, row = model.info.model_id, self._row(model)
        if model.told != told:
            self._worker.order(model.told)
            line = "%s: at most %d sequences at once, %d tokens of prefill a step; guard: %s"
            level = logging.WARNING if isinstance(model.state, Degraded) else logging.INFO
            if isinstance(model.search, knee.Trying):
                level = logging.DEBUG
            log.log(level, line, name, row["concurrency"], row["prefill_tokens"], row["guard"])
        self._metrics.concurrency.labels(name).set(_rows(model))
        self._metrics.guard_degraded.labels(name).set(isinstance(model.state, Degraded))


def _rows(model: _Model) -> int:
    return model.told.max_num_seqs or model.info.max_num_seqs
