"""Rollouts that run: which model answers a request, what its answer adds to the figures, and what
follows from them. The decisions are `rollout.decide`'s; they are kept in a file, so that a rollback
outlives the server.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal, assert_never

import msgspec
from msgspec import Meta

from mlx_serving import clock
from mlx_serving.errors import InvalidRequest, RequestNotFound
from mlx_serving.telemetry.events import Company, Met, RequestFinished
from mlx_serving.traffic import kept
from mlx_serving.traffic.rollout import (
    METRICS,
    STAGES,
    Advance,
    Figures,
    Hold,
    Metric,
    Promote,
    RollBack,
    Stage,
    comparisons,
    decide,
    estimates,
    regardless,
    stratum,
)
from mlx_serving.traffic.routing import takes_part
from mlx_serving.traffic.stats import Moments

log = logging.getLogger(__name__)

Mode = Literal["canary", "ab", "shadow"]
"""canary: stages, decided by the figures; ab: a share that stays; shadow: the variant answers
copies, and nobody sees its answers."""
MetricName = Literal[
    "error",
    "ttft",
    "tpot",
    "tokens_per_s",
    "empty",
    "capped",
    "malformed",
    "broken_off",
    "disagreement",
    "logprob",
    "score",
]
Status = Literal["running", "promoted", "rolled_back", "stopped"]
SAVE_EVERY = 20
"""Requests between two writes of the figures."""
MAX_NOTES = 100


class Spec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to try on whom. `variant` is another served model: other weights, another quantisation, or
    the same files with other settings."""

    name: Annotated[str, Meta(min_length=1, max_length=100)]
    model: str
    variant: str
    mode: Mode = "canary"
    stages: Annotated[tuple[Stage, ...], Meta(min_length=1, max_length=20)] = STAGES
    """The variant's share, stage by stage; ab and shadow stay in the first."""
    alpha: Annotated[float, Meta(gt=0, le=0.5)] = 0.05
    """Chance that a variant that is no worse is rolled back, over the whole rollout."""
    metrics: Annotated[tuple[MetricName, ...], Meta(min_length=1)] | None = None
    """Those that count; default: all that the mode has, but logprob and score."""

    @property
    def compared(self) -> tuple[Metric, ...]:
        named, modes = self.metrics, (None, self.mode)
        if named is None:
            return tuple(metric for metric in METRICS if metric.only in modes)
        return tuple(metric for metric in METRICS if metric.name in named)


class Score(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a judge says of one answer."""

    model: str
    """Which of the two gave it."""
    score: Annotated[float, Meta(ge=0, le=1)]
    """1 is best."""


class Note(msgspec.Struct, frozen=True):
    at_s: float
    """Unix time."""
    what: str


class Rollout(msgspec.Struct, kw_only=True):
    spec: Spec
    status: Status = "running"
    stage: int = 0
    stage_began_s: float
    """Unix time."""
    figures: Figures = msgspec.field(default_factory=Figures)
    last: str = ""
    """What the latest look at the figures said."""
    notes: list[Note] = []


class Arm(msgspec.Struct, frozen=True):
    """One request's place in a rollout."""

    rollout: str
    model: str
    """The served model that answers."""
    is_variant: bool


class MetricReport(msgspec.Struct, frozen=True, kw_only=True):
    """One metric's comparison: over all stages by the bound that decides, and by Welch's test of the
    present stage. Differences are the variant's from the model's, in `unit`."""

    metric: str
    scale: Literal["log", "share"]
    n: tuple[int, int]
    mean: tuple[float, float]
    """Of the model and the variant: a ratio scale's geometric mean, or a share."""
    unit: Literal["%", "points"]
    difference: float
    low: float
    high: float
    p: float | None = None
    d: float | None = None
    ci: tuple[float, float] | None = None
    """Welch's 95 % interval."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    model: str
    variant: str
    mode: Mode
    status: Status
    stage: int
    """Counted from 1."""
    stages: int
    share: float
    samples: tuple[int, int]
    last: str
    metrics: list[MetricReport]
    notes: list[Note]


FAILED: Mapping[str, float] = {"error": 1.0}
"""The figures of a request without an answer."""
_ALONE = Company(Met(0.0, 1.0), Met(0.0, 1.0))


def measured(finished: RequestFinished) -> Mapping[str, float] | None:
    """One request's figures; None where they say nothing of the model that answered.

    Of its times, what other models of the worker took is left out: the rest is the model's own.
    """
    if finished.outcome == "cancelled" or not finished.computed:
        return None
    if not finished.complete:
        return FAILED
    figures = {
        "error": 0.0,
        "empty": float(finished.empty),
        "capped": float(finished.outcome == "length"),
        "malformed": float(finished.malformed),
    }
    if finished.broken_off is not None:
        figures["broken_off"] = float(finished.broken_off)
    if finished.logprob is not None and math.isfinite(finished.logprob):
        figures["logprob"] = finished.logprob
    return figures | {name: math.log(value) for name, value in _times(finished) if value > 0}


def _times(finished: RequestFinished) -> Iterator[tuple[str, float]]:
    ttft_ms, tpot_ms, whole_ms = finished.ttft_ms, finished.tpot_ms, finished.duration_ms
    if ttft_ms is None:
        return
    company = finished.company or _ALONE
    first, after = company.first, company.after
    rest_ms = whole_ms - ttft_ms
    yield stratum("ttft", first.sequences), _own(ttft_ms, first.others_ms)
    if tpot_ms is not None and rest_ms > 0:
        share = _own(rest_ms, after.others_ms) / rest_ms
        yield stratum("tpot", after.sequences), tpot_ms * share
    if whole_ms > 0:
        sequences = (first.sequences * ttft_ms + after.sequences * rest_ms) / whole_ms
        own_ms = _own(whole_ms, first.others_ms + after.others_ms)
        rate = 1e3 * finished.usage.completion_tokens / own_ms
        yield stratum("tokens_per_s", sequences), rate


def _own(whole_ms: float, others_ms: float) -> float:
    """Steps are counted when they end, so that a short time may have had more than fits into it."""
    return max(whole_ms - others_ms, 0.01 * whole_ms)


class Rollouts:
    """Not thread-safe: of one event loop's thread.

    Args:
        file: where they are kept; None: nowhere.
        on_change: hears of those that are kept, and of every change of status or stage.
        now: Unix seconds.
    """

    def __init__(
        self,
        file: Path | None = None,
        on_change: Callable[[Rollout], None] = lambda _: None,
        now: clock.Clock = clock.wall,
    ) -> None:
        self._file = file
        self._on_change = on_change
        self._now = now
        # Rather no rollout than a server that does not start: models answer for themselves.
        self._all = {found.spec.name: found for found in kept.read(file, list[Rollout], [])}
        self._unsaved = 0
        for found in self._all.values():
            on_change(found)

    # What the admin says

    def start(self, spec: Spec) -> Rollout:
        """Raises InvalidRequest where the name is taken or the model's traffic is split already."""
        if spec.mode != "shadow" and "disagreement" in (spec.metrics or ()):
            raise InvalidRequest("Only a shadow's answers can disagree.", param="metrics")
        if spec.model == spec.variant:
            raise InvalidRequest("A model cannot be its own variant.", param="variant")
        if spec.name in self._all:
            raise InvalidRequest(f"There is a rollout '{spec.name}' already.", param="name")
        self._check_free(spec)
        found = Rollout(spec=spec, stage_began_s=self._now())
        self._all[spec.name] = found
        self._change(found, "running", f"started: {spec.variant} takes {_share(found)}")
        return found

    def promote(self, name: str) -> Rollout:
        """From here on the variant answers everything. Raises InvalidRequest for a shadow, whose variant
        answers nobody, and where another rollout has the model's traffic by now."""
        found = self.get(name)
        if found.spec.mode == "shadow":
            raise InvalidRequest(
                f"'{name}' is a shadow, whose answers nobody has seen: start a canary.",
                param="name",
            )
        self._check_free(found.spec)
        self._change(found, "promoted", "promoted by hand")
        return found

    def roll_back(self, name: str, why: str = "by hand") -> Rollout:
        """From here on the model answers everything; what runs goes on where it is."""
        found = self.get(name)
        self._change(found, "rolled_back", f"rolled back {why}")
        return found

    def remove(self, name: str) -> None:
        """Forget it; the model answers for itself again."""
        found = self.get(name)
        del self._all[name]
        self._change(found, "stopped", "removed")

    def get(self, name: str) -> Rollout:
        if name not in self._all:
            raise RequestNotFound(f"There is no rollout '{name[:200]}'.", code="rollout_not_found")
        return self._all[name]

    def names(self) -> list[str]:
        return list(self._all)

    # What requests do

    def arm(self, model: str, key: str) -> Arm | None:
        """Who answers a request for `model`; None: there is no choice to be made.

        `key` names whoever is to stay with one variant: a user, a session, or the request.
        """
        found = self._of(model)
        if found is None or found.spec.mode == "shadow":
            return None
        if found.status == "promoted":
            return Arm(found.spec.name, found.spec.variant, True)
        is_variant = takes_part(found.spec.name, key, found.spec.stages[found.stage].share)
        return Arm(found.spec.name, found.spec.variant if is_variant else model, is_variant)

    def shadow(self, model: str, key: str) -> Arm | None:
        """Who answers a copy of a request for `model`, if anybody does."""
        found = self._of(model)
        if found is None or found.spec.mode != "shadow" or found.status != "running":
            return None
        taken = takes_part(found.spec.name, key, found.spec.stages[0].share)
        return Arm(found.spec.name, found.spec.variant, True) if taken else None

    def observe(self, arm: Arm, values: Mapping[str, float]) -> None:
        """Count one answer's figures (by metric name, on the metric's scale), and act on them."""
        found = self._all.get(arm.rollout)
        if found is None or found.status != "running":
            return
        found.figures.add(found.stage, arm.is_variant, values)
        self._unsaved += 1
        if found.spec.mode == "canary":
            self._decide(found)
        if self._unsaved >= SAVE_EVERY:
            self._save()

    def score(self, name: str, given: Score) -> None:
        """Count a judge's word on an answer. Raises InvalidRequest, naming the field of `given`."""
        spec = self.get(name).spec
        if "score" not in (spec.metrics or ()):
            raise InvalidRequest(f"'score' is not among the metrics of '{name}'.", param="score")
        if given.model not in (spec.model, spec.variant):
            either = f"'{spec.model}' or '{spec.variant}'"
            raise InvalidRequest(f"Rollout '{name}' is about {either}.", param="model")
        arm = Arm(name, given.model, given.model == spec.variant)
        self.observe(arm, {"score": given.score})

    def report(self, name: str) -> Report:
        found = self.get(name)
        figures, spec = found.figures, found.spec
        return Report(
            name=name,
            model=spec.model,
            variant=spec.variant,
            mode=spec.mode,
            status=found.status,
            stage=found.stage + 1,
            stages=len(spec.stages) if spec.mode == "canary" else 1,
            share=effective_share(found),
            samples=(_samples(figures, False), _samples(figures, True)),
            last=found.last,
            metrics=_metric_reports(found),
            notes=found.notes,
        )

    def save(self) -> None:
        if self._unsaved:
            self._save()

    def _check_free(self, spec: Spec) -> None:
        """Raises InvalidRequest where another rollout has the traffic of the model."""
        busy = self._of(spec.model)
        if busy is not None and busy.spec.name != spec.name:
            raise InvalidRequest(
                f"The traffic of '{spec.model}' is in rollout '{busy.spec.name}' ({busy.status}).",
                param="model",
            )

    def _of(self, model: str) -> Rollout | None:
        live = ("running", "promoted")
        rollouts = self._all.values()
        return next((r for r in rollouts if r.spec.model == model and r.status in live), None)

    def _decide(self, found: Rollout) -> None:
        spec, now_s = found.spec, self._now()
        stage_s = now_s - found.stage_began_s
        decision = decide(
            spec.stages,
            found.stage,
            stage_s,
            found.figures,
            alpha=spec.alpha,
            metrics=spec.compared,
        )
        match decision:
            case Hold(why):
                found.last = why
            case Advance(stage):
                found.stage, found.stage_began_s = stage, now_s
                self._change(found, "running", f"stage {stage + 1}: {_share(found)}")
            case Promote():
                self._change(found, "promoted", "no stage showed it worse: promoted")
            case RollBack(_, why):
                self._change(found, "rolled_back", f"rolled back: {why}")
            case _:
                assert_never(decision)

    def _change(self, found: Rollout, status: Status, what: str) -> None:
        found.status, found.last = status, what
        found.notes = [*found.notes[-MAX_NOTES:], Note(self._now(), what)]
        log.warning("rollout %s: %s", found.spec.name, what)
        self._save()
        self._on_change(found)

    def _save(self) -> None:
        self._unsaved = 0
        kept.write(self._file, list(self._all.values()))


def effective_share(found: Rollout) -> float:
    """What the variant takes now."""
    match found.status:
        case "promoted":
            return 1.0
        case "rolled_back" | "stopped":
            return 0.0
        case "running":
            return found.spec.stages[found.stage].share
        case _:
            assert_never(found.status)


def _share(found: Rollout) -> str:
    return f"{100 * found.spec.stages[found.stage].share:g} % of '{found.spec.model}'"


def _samples(figures: Figures, variant: bool) -> int:
    return sum(figures.samples(stage, variant) for stage in range(len(figures.strata)))


def _metric_reports(found: Rollout) -> list[MetricReport]:
    figures = found.figures
    tests = {m.name: test for m, test in comparisons(figures, found.stage)}
    spec, reports = found.spec, []
    known = dict(regardless(figures, spec.stages, spec.alpha, spec.compared))
    known |= dict(estimates(figures, spec.alpha, spec.compared))
    for metric, estimate in ((m, known[m]) for m in spec.compared if m in known):
        pairs = list(figures.of(metric.name))
        test = tests.get(metric.name)
        reports.append(
            MetricReport(
                metric=metric.name,
                scale=metric.scale,
                n=(sum(a.n for a, _ in pairs), sum(b.n for _, b in pairs)),
                mean=(_mean(metric, [a for a, _ in pairs]), _mean(metric, [b for _, b in pairs])),
                unit=metric.unit,
                difference=metric.shown(estimate.difference),
                low=metric.shown(estimate.low),
                high=metric.shown(estimate.high),
                p=test.p if test else None,
                d=test.d if test else None,
                ci=(metric.shown(test.low), metric.shown(test.high)) if test else None,
            )
        )
    return reports


def _mean(metric: Metric, moments: list[Moments]) -> float:
    total = sum(m.n for m in moments)
    mean = sum(m.n * m.mean for m in moments) / total if total else 0.0
    return math.exp(mean) if metric.scale == "log" else mean
