"""What looks at finished requests: service levels with their remedies and alerts, and drift."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from mlx_serving.config import Config, Remedy
from mlx_serving.telemetry.events import (
    Event,
    EventBus,
    ModelLoaded,
    RequestFinished,
    WorkerStarted,
)
from mlx_serving.telemetry.metrics import Metrics
from mlx_serving.traffic.admission import Admission
from mlx_serving.traffic.alerts import Alerts
from mlx_serving.traffic.ceilings import Ceilings
from mlx_serving.traffic.favour import Favour
from mlx_serving.traffic.levels import TICK_S, LevelChanged, Levels
from mlx_serving.traffic.regression import Drift, Drifts, settings_of
from mlx_serving.traffic.rollouts import Rollouts
from mlx_serving.traffic.slo import Objective, parse
from mlx_serving.types import Priority

_DEPENDS = (
    "max_num_seqs",
    "prefill_step_size",
    "pipeline_depth",
    "kernels",
    "kv_bits",
    "dtype",
    "exact_batch",
    "jump_forward",
    "max_itl_ms",
    "prefix_cache_bytes",
)
"""Settings that figures depend on, and that only another start changes."""


class Relief(Protocol):
    """Memory that idle models could give up; the catalog's."""

    @property
    def possible(self) -> bool: ...

    def keep_out(self, models: int) -> None: ...


class Watch:
    """Hears of every finished request from `start` to `stop`.

    Raises ConfigError for an objective that is none.
    """

    def __init__(
        self,
        config: Config,
        admission: Admission,
        ceilings: Ceilings,
        rollouts: Rollouts,
        favour: Favour,
        relief: Relief,
        events: EventBus,
        metrics: Metrics,
    ) -> None:
        self._events = events
        self._metrics = metrics
        dropped = metrics.alerts_dropped.inc
        self._alerts = (
            Alerts(config.alert_webhook, config.alert_format, on_drop=dropped)
            if config.alert_webhook
            else None
        )
        self._levels = Levels(
            [parse(text) for text in config.slo],
            _Hands(admission, ceilings, rollouts, favour, relief),
            ladder=config.slo_remedies,
            dry_run=config.slo_dry_run,
            on_change=self._changed,
        )
        self._drifts = _drifts(config, self._drifted) if config.watch_drift else None
        self._unhook: list[Callable[[], None]] = []
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Needs a running event loop."""
        self._unhook = [
            self._events.add_hook(self._finished, RequestFinished),
            self._events.add_hook(self._mark, ModelLoaded),
            self._events.add_hook(self._mark, WorkerStarted),
        ]
        self._task = asyncio.create_task(self._tick(), name="watch")

    async def stop(self) -> None:
        for unhook in self._unhook:
            unhook()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._levels.end()
        if self._alerts is not None:
            await self._alerts.close()

    def health(self) -> dict[str, object]:
        """For /health."""
        found: dict[str, object] = {"slos": self._levels.report()}
        if self._drifts is not None:
            found["drifts"] = [
                {**msgspec.to_builtins(drift), "text": drift.line} for drift in self._drifts.found
            ]
        return found

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._levels.tick()
            for text, burn in self._levels.burns().items():
                self._metrics.slo_burn.labels(text).set(burn.short)
            for text, figure in self._levels.figures().items():
                self._metrics.slo_figure.labels(text).set(figure)

    def _finished(self, event: RequestFinished) -> None:
        if event.shadow:  # it was promised to nobody, and waits behind everybody
            return
        self._levels.observe(event)
        if self._drifts is not None:
            self._drifts.observe(event)

    def mark(self, what: str) -> None:
        """Something happened that figures may change after."""
        if self._drifts is not None:
            self._drifts.mark(what)

    def _mark(self, event: Event) -> None:
        match event:
            case ModelLoaded(model_id=model_id):
                self.mark(f"{model_id} was loaded")
            case WorkerStarted():
                self.mark("a worker started")

    def _changed(self, change: LevelChanged) -> None:
        violated = change.state == "violated"
        self._metrics.slo_violated.labels(change.objective).set(violated)
        if change.act is not None and change.remedy is not None:
            self._metrics.remedies.labels(change.remedy, change.act).inc()
        if self._alerts is not None:
            self._alerts.add(change)

    def _drifted(self, drift: Drift) -> None:
        self._metrics.drifts.labels(drift.model, drift.metric).inc()


def _drifts(config: Config, on_drift: Callable[[Drift], None]) -> Drifts:
    file = Path(config.baselines_file) if config.baselines_file else None
    depends = {name: getattr(config, name) for name in _DEPENDS}
    depends["models"] = [entry.settings for entry in config.entries if entry.settings]
    depends["machine"] = f"{os.uname().nodename} {os.cpu_count()}"
    return Drifts(file, settings_of(depends), on_drift)


class _Hands:
    """What remedies for service levels can do here."""

    def __init__(
        self,
        admission: Admission,
        ceilings: Ceilings,
        rollouts: Rollouts,
        favour: Favour,
        relief: Relief,
    ) -> None:
        self._favour = favour
        self._relief = relief
        self._admission = admission
        self._ceilings = ceilings
        self._rollouts = rollouts

    def narrow(self, shed_from: Priority | None, halvings: int) -> None:
        self._admission.narrow(shed_from, halvings)

    def tune(self, chunk_halvings: int, ceiling_steps: int) -> None:
        self._ceilings.tune(chunk_halvings, ceiling_steps)

    def favour(self, objectives: Sequence[Objective]) -> None:
        self._favour.objectives = objectives

    def keep_out(self, models: int) -> None:
        self._relief.keep_out(models)

    def roll_back(self) -> None:
        for name in self._running():
            self._rollouts.roll_back(name, "for a service level that is not kept")

    def can(self, remedy: Remedy) -> bool:
        match remedy:
            case "evict_idle":
                return self._relief.possible
            case "roll_back":
                return bool(self._running())
            case _:
                return True

    def _running(self) -> list[str]:
        names = self._rollouts.names()
        return [name for name in names if self._rollouts.get(name).status == "running"]
