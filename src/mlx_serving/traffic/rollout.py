"""A rollout: a variant takes a growing share of a model's traffic, and gives it back when it is worse.

    Running(stage 1) ─▶ Running(stage 2) ─▶ … ─▶ Promoted
           └──────────────────┴───────────▶ RolledBack(why)

`decide` is a pure function from the figures of both arms to what to do. It may be asked after every
request, so a fixed-size test would raise a false alarm sooner or later; what ends a rollout is a
confidence sequence (`stats.anytime`), which covers the true difference at all looks together: a
metric's bound lies wholly on the worse side, and its estimate is worse by more than matters. The
chance of a false alarm over the whole rollout, `alpha`, is divided by the number of metrics
(Bonferroni). Welch's tests, stage by stage, are for the report (`comparisons`).

A stage does not end while a metric's estimate is worse by more than matters: more requests come
until the bound is sure, or the estimate is not. Stages are strata: the load at different shares
cannot pass for a difference between the arms. Times are compared between requests that shared their
steps with as many (`stratum`), since the arm with the smaller share has smaller batches; and all of
them once more with company charged at its most (`regardless`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from mlx_serving.traffic.stats import Estimate, Moments, Welch, anytime, welch


@dataclass(frozen=True, slots=True)
class Metric:
    """One figure of a request, and what difference in it matters."""

    name: str
    scale: Literal["log", "share"]
    """log: a positive figure, compared by ratio; share: from 0 to 1, compared by difference."""
    worse: Literal["higher", "lower"]
    matters: float
    """The least difference that matters, on the scale: log(1.05) is 5 %, 0.02 two in a hundred."""
    timed: Literal["steps", "wait"] | None = None
    """It depends on how many sequences share its steps, or on how many wait with it, too; it is counted by
    `stratum`."""
    only: Literal["shadow", "named"] | None = None
    """In shadows only; or only where a rollout names it."""

    def worsening(self, difference: float) -> float:
        return difference if self.worse == "higher" else -difference

    @property
    def unit(self) -> Literal["%", "points"]:
        """Of `shown`."""
        return "points" if self.scale == "share" else "%"

    def shown(self, difference: float) -> float:
        """In percent or percentage points."""
        return 100 * (difference if self.scale == "share" else math.expm1(difference))

    def say(self, difference: float) -> str:
        return f"{self.shown(difference):+.1f} {self.unit}"


_FIVE_PERCENT = math.log(1.05)
METRICS = (
    Metric("error", "share", "higher", 0.02),
    Metric("ttft", "log", "higher", _FIVE_PERCENT, timed="wait"),
    Metric("tpot", "log", "higher", _FIVE_PERCENT, timed="steps"),
    Metric("tokens_per_s", "log", "lower", _FIVE_PERCENT, timed="wait"),
    Metric("empty", "share", "higher", 0.02),
    Metric("capped", "share", "higher", 0.05),
    Metric("malformed", "share", "higher", 0.02),
    Metric("broken_off", "share", "higher", 0.02),
    Metric("disagreement", "share", "higher", 0.05, only="shadow"),
    Metric("logprob", "log", "lower", _FIVE_PERCENT, only="named"),
    Metric("score", "share", "lower", 0.02, only="named"),
)
USUAL = tuple(metric for metric in METRICS if metric.only is None)
_SHARE_FLOOR = 0.01
"""Least variance of a share: twenty requests without an error do not prove that there are none."""


class Stage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    share: Annotated[float, Meta(gt=0, le=1)]
    """Of the traffic, that the variant takes."""
    min_samples: Annotated[int, Meta(ge=1)] = 300
    """Requests that each arm must have answered in this stage."""
    min_s: Annotated[float, Meta(ge=0)] = 60.0


STAGES = (Stage(0.10), Stage(0.25), Stage(0.50), Stage(1.0))

ArmFigures = dict[str, Moments]
"""By metric or, of one that depends on company, by `stratum`."""

_BAND = math.log(1.25)


def stratum(metric: str, sequences: float) -> str:
    """Where a figure of a request belongs that shared its model's steps with so many, itself included:
    1 to 1.25, to 1.56 and so on."""
    return f"{metric}@{int(math.log(max(1.0, sequences)) / _BAND + 1e-9)}"


_NONE = Moments()
_REGARDLESS = 0.1
"""The part of a time's chance of a false alarm that comparing without strata may take."""


@dataclass(slots=True)
class Figures:
    """Both arms' moments, stage by stage."""

    strata: list[tuple[ArmFigures, ArmFigures]] = field(default_factory=list)
    """(baseline, variant) of each stage."""

    def add(self, stage: int, variant: bool, values: Mapping[str, float]) -> None:
        while len(self.strata) <= stage:
            self.strata.append(({}, {}))
        arm = self.strata[stage][variant]
        for name, value in values.items():
            arm.setdefault(name, Moments()).add(value)

    def samples(self, stage: int, variant: bool) -> int:
        if stage >= len(self.strata):
            return 0
        moments = self.strata[stage][variant].get("error")  # every request has this one
        return moments.n if moments is not None else 0

    def of(self, metric: str, stage: int | None = None) -> Iterator[tuple[Moments, Moments]]:
        """Both arms' moments in each stratum of every stage, or of one."""
        stages = self.strata if stage is None else self.strata[stage : stage + 1]
        for baseline, variant in stages:
            names = {n for n in (*baseline, *variant) if n.partition("@")[0] == metric}
            for name in sorted(names):
                yield baseline.get(name, _NONE), variant.get(name, _NONE)

    def whole(
        self, metric: Metric, charged: bool, stages: Sequence[Stage]
    ) -> Iterator[tuple[Moments, Moments]]:
        """Both arms' moments in every stage, whatever company the requests had.

        `charged`: a step that n sequences share counts as an n-th of one, the variant's n taken a
        band too large. It takes at most n times as long, so no more can be owed to company. A queue
        knows no such bound: with more than half of the traffic the variant's may be longer by any
        factor, and what includes it is left out.
        """
        sign = 1 if metric.worse == "higher" else -1
        for stage, arms in zip(stages, self.strata, strict=False):
            if metric.timed == "wait" and stage.share > 0.5:
                continue
            whole = Moments(), Moments()
            for variant, arm in enumerate(arms):
                for name, part in arm.items():
                    of, _, band = name.partition("@")
                    if of == metric.name:
                        owed = sign * _BAND * (int(band or 0) + variant) if charged else 0.0
                        whole[variant].join(Moments(part.n, part.mean - owed, part.m2))
            yield whole


@dataclass(frozen=True, slots=True)
class Hold:
    why: str


@dataclass(frozen=True, slots=True)
class Advance:
    stage: int


@dataclass(frozen=True, slots=True)
class Promote:
    pass


@dataclass(frozen=True, slots=True)
class RollBack:
    metric: str
    why: str


Decision = Hold | Advance | Promote | RollBack


def decide(
    stages: Sequence[Stage],
    stage: int,
    stage_s: float,
    figures: Figures,
    *,
    alpha: float = 0.05,
    metrics: Sequence[Metric] = USUAL,
) -> Decision:
    """What to do now.

    Args:
        stage: index of the present one, which has lasted `stage_s` seconds.
        alpha: chance that a variant that is no worse is rolled back, over the whole rollout.
        metrics: those that count.
    """
    worst = guard(figures, stages, alpha, metrics)
    if isinstance(worst, RollBack):
        return worst
    now = stages[stage]
    fewest = min(figures.samples(stage, True), _baseline_samples(stages, stage, figures))
    if fewest < now.min_samples:
        return Hold(f"{fewest} of {now.min_samples} requests answered by the arm with fewer")
    if stage_s < now.min_s:
        return Hold(f"{stage_s:.0f} of {now.min_s:.0f} s")
    if worst is not None:
        return worst
    return Advance(stage + 1) if stage + 1 < len(stages) else Promote()


def guard(
    figures: Figures, stages: Sequence[Stage], alpha: float, metrics: Sequence[Metric] = USUAL
) -> RollBack | Hold | None:
    """RollBack: a metric is surely worse, and by more than matters. Hold: it may be."""
    doubt: Hold | None = None
    found = (*estimates(figures, alpha, metrics), *regardless(figures, stages, alpha, metrics))
    for metric, estimate in found:
        worsening = metric.worsening(estimate.difference)
        if worsening <= metric.matters:
            continue
        said, surely = metric.say(estimate.difference), _least(metric, estimate)
        if metric.worsening(surely) > 0:
            why = f"{metric.name} {said}, surely {metric.say(surely)} or worse"
            return RollBack(metric.name, why)
        doubt = doubt or Hold(f"{metric.name} looks {said}; more requests decide")
    return doubt


def estimates(
    figures: Figures, alpha: float, metrics: Sequence[Metric] = USUAL
) -> Iterator[tuple[Metric, Estimate]]:
    """Each metric's difference over all stages, with bounds that hold together at every look."""
    for metric in metrics:
        floor = _SHARE_FLOOR if metric.scale == "share" else 0.0
        each = alpha / len(metrics) * (1 - _REGARDLESS if metric.timed else 1)
        found = anytime(figures.of(metric.name), alpha=each, effect=metric.matters, floor=floor)
        if found is not None:
            yield metric, found


def regardless(
    figures: Figures, stages: Sequence[Stage], alpha: float, metrics: Sequence[Metric]
) -> Iterator[tuple[Metric, Estimate]]:
    """Of the times, how much worse the variant is at least, whatever company its requests had.

    Where requests pile up because the variant is slow, or the smaller share has next to no company,
    hardly anyone is left to be compared at like company. More company than the other arm's makes a
    request slower, less makes it faster: so the difference as it is, or the one with all company
    `charged`, is no worse than the true one, and the milder of both counts.
    """
    for metric in metrics:
        if not metric.timed:
            continue
        each = alpha / len(metrics) * _REGARDLESS
        both = (
            anytime(figures.whole(metric, charged, stages), alpha=each, effect=metric.matters)
            for charged in (False, True)
        )
        found = [estimate for estimate in both if estimate is not None]
        if found:
            yield metric, min(found, key=lambda e: metric.worsening(_least(metric, e)))


def _least(metric: Metric, estimate: Estimate) -> float:
    """The bound on the better side."""
    return estimate.low if metric.worse == "higher" else estimate.high


def comparisons(figures: Figures, stage: int) -> Iterator[tuple[Metric, Welch]]:
    """Welch's test of each metric in one stage, where both arms have something to say."""
    for metric in METRICS:
        test = welch(figures.of(metric.name, stage))
        if test is not None:
            yield metric, test


def _baseline_samples(stages: Sequence[Stage], stage: int, figures: Figures) -> int:
    """At a share of 1 nobody is left to compare with; the earlier stages have done that."""
    if stages[stage].share >= 1.0:
        return stages[stage].min_samples
    return figures.samples(stage, False)
