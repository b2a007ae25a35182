"""Drift: whether a model answers as it used to, with these settings, on this machine.

The first `LEARN` blocks of requests make a baseline, which is kept across restarts. From then on
every block's mean is held to it by a one-sided CUSUM: it sums how far blocks lie on the worse side,
less an allowance, and raises an alarm when the sum is more than chance gives in some ten thousand
blocks. When the sum last was 0 is when the drift began.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from mlx_serving import clock
from mlx_serving.telemetry.events import RequestFinished
from mlx_serving.traffic import kept
from mlx_serving.traffic.rollout import Metric
from mlx_serving.traffic.stats import Moments

log = logging.getLogger(__name__)

BLOCK = 20
"""Requests in a block: means of so many are nearly normal, whatever single latencies look like."""
LEARN = 30
"""Blocks in a baseline."""
DOUBT = 1.25
"""What a deviation that so few blocks show is multiplied by: it may be larger."""
ALLOWANCE = 0.75
"""In deviations of a block's mean: drifts of less than twice that are let pass longest."""
ALARM_AT = 10.0
AT_MOST = 20.0
"""The sum grows no further, so that what is over is soon seen to be."""
MAX_MARKS = 50

METRICS = (
    Metric("ttft", "log", "higher", math.log(1.1)),
    Metric("tpot", "log", "higher", math.log(1.1)),
    Metric("prefix_hits", "share", "lower", 0.05),
)
"""`matters`: a baseline's deviation is taken to be at least half of that, so that a model which always
answers alike does not raise an alarm for nothing."""


class Baseline(msgspec.Struct):
    """Of one metric: moments of its blocks' means."""

    blocks: Moments = msgspec.field(default_factory=Moments)

    @property
    def learnt(self) -> bool:
        return self.blocks.n >= LEARN


class Drift(msgspec.Struct, frozen=True, kw_only=True):
    """Something got worse and stayed so."""

    model: str
    metric: str
    before: float
    now: float
    """Geometric mean in ms, or a share; of the baseline, and since the drift began."""
    since_s: float
    """Unix time."""
    after: str | None
    """What happened last before it began: a load, a restart, settings that changed."""

    @property
    def line(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.since_s))
        after = f", after {self.after}" if self.after else ""
        if self.metric == "prefix_hits":
            what = f"prefix hits fell from {100 * self.before:.0f} % to {100 * self.now:.0f} %"
        else:
            what = f"{self.metric} rose from {self.before:.1f} to {self.now:.1f} ms"
        return f"{self.model}: {what} since {since}{after}"


@dataclass(slots=True)
class Cusum:
    """How far a metric has drifted. `since_s`: when the sum was 0 last."""

    total: float = 0.0
    since_s: float = 0.0
    first_s: float = 0.0
    """The end of the first block after that."""
    mean: Moments = field(default_factory=Moments)
    """Of the blocks since then."""
    told: bool = False


def advance(state: Cusum, worse_by: float, mean: float, now_s: float) -> bool:
    """Count a block that lies `worse_by` deviations on the worse side; whether that raises an alarm.
    It is raised once, and again only after the metric has been as it was."""
    state.total = min(AT_MOST, max(0.0, state.total + worse_by - ALLOWANCE))
    if state.total == 0.0:
        state.since_s, state.mean, state.told = now_s, Moments(), False
        return False
    if state.mean.n == 0:
        state.first_s = now_s
    state.mean.add(mean)
    alarm = state.total >= ALARM_AT and not state.told
    state.told = state.told or alarm
    return alarm


class Drifts:
    """Args: file: where baselines are kept; None: nowhere. settings: what the figures depend on
    besides the model, as text. on_drift: must not raise. now: Unix seconds."""

    def __init__(
        self,
        file: Path | None,
        settings: str,
        on_drift: Callable[[Drift], None] = lambda _: None,
        now: clock.Clock = clock.wall,
    ) -> None:
        self._file = file
        self._settings = settings
        self._on_drift = on_drift
        self._now = now
        self._baselines = kept.read(file, dict[str, Baseline], {})
        self._blocks: dict[str, Moments] = {}
        self._cusums: dict[str, Cusum] = {}
        self._marks: deque[tuple[float, str]] = deque(maxlen=MAX_MARKS)
        self.found: deque[Drift] = deque(maxlen=MAX_MARKS)

    def mark(self, what: str) -> None:
        """Something happened that figures may change after."""
        self._marks.append((self._now(), what))

    def observe(self, finished: RequestFinished) -> None:
        says = finished.complete and finished.computed and finished.usage.completion_tokens
        if not says:
            return
        figures = _figures(finished)
        for metric in METRICS:
            if (value := figures.get(metric.name)) is None:
                continue
            key = f"{finished.model_id}|{metric.name}|{self._settings}"
            block = self._blocks.setdefault(key, Moments())
            block.add(value)
            if block.n >= BLOCK:
                del self._blocks[key]
                self._block(key, metric, finished.model_id, block.mean)

    def _block(self, key: str, metric: Metric, model: str, mean: float) -> None:
        baseline = self._baselines.setdefault(key, Baseline())
        now_s = self._now()
        if not baseline.learnt:
            baseline.blocks.add(mean)
            if baseline.learnt:
                self._save()
            return
        state = self._cusums.setdefault(key, Cusum(since_s=now_s))
        deviation = max(DOUBT * math.sqrt(baseline.blocks.variance), metric.matters / 2)
        worse_by = metric.worsening(mean - baseline.blocks.mean) / deviation
        if advance(state, worse_by, mean, now_s):
            self._tell(metric, model, baseline, state)

    def _tell(self, metric: Metric, model: str, baseline: Baseline, state: Cusum) -> None:
        before = [what for at_s, what in self._marks if at_s <= state.first_s]
        drift = Drift(
            model=model,
            metric=metric.name,
            before=_plain(metric, baseline.blocks.mean),
            now=_plain(metric, state.mean.mean),
            since_s=state.since_s,
            after=before[-1] if before else None,
        )
        self.found.append(drift)
        log.warning("%s", drift.line)
        self._on_drift(drift)

    def _save(self) -> None:
        kept.write(self._file, {key: base for key, base in self._baselines.items() if base.learnt})


def settings_of(given: Mapping[str, object]) -> str:
    """Settings as a text that is equal where they are."""
    return json.dumps(given, sort_keys=True, default=str)


def _figures(finished: RequestFinished) -> dict[str, float]:
    prompt = finished.usage.prompt_tokens
    figures = {"prefix_hits": finished.usage.cached_tokens / prompt} if prompt else {}
    times = {"ttft": finished.ttft_ms, "tpot": finished.tpot_ms}
    return figures | {name: math.log(ms) for name, ms in times.items() if ms}


def _plain(metric: Metric, mean: float) -> float:
    return math.exp(mean) if metric.scale == "log" else mean
