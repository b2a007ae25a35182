"""Service levels: what was promised, how fast the promise is being used up, and what follows.

An objective such as `ttft p95 < 500ms` promises that at most 5 % of requests take longer: that 5 %
is its error budget. The *burn rate* is the share of requests over the limit divided by the budget:
at 1 the promise is just kept. It is looked at over a short and a long window together, so that one
slow request does not raise an alarm and an old trouble does not keep one up:

            burn ≥ 1 in the long window          ≥ 2 in both
    Ok ──────────────────────────────▶ AtRisk ───────────────▶ Violated
    ▲ ◀──────── < 0.8 in both ───────────┘                       │ < 1 in the short one
    └── < 1 in the long one, for a while ── Recovering ◀─────────┘ ──▶ Violated again at ≥ 2
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, assert_never

from mlx_serving.errors import ConfigError
from mlx_serving.telemetry.events import RequestFinished
from mlx_serving.traffic.window import Window
from mlx_serving.types import Priority

MetricName = Literal["ttft", "tpot", "queue", "duration", "errors", "throughput"]
VIOLATED_AT = 2.0
AT_RISK_AT = 1.0
CALM_AT = 0.8
RECOVERY_S = 60.0
"""How long a violated objective must hold again before it is believed."""
MIN_REQUESTS = 10
"""In the short window; fewer say nothing."""


@dataclass(frozen=True, slots=True)
class Objective:
    """One promise. `budget` is the share of requests that may miss `limit`."""

    text: str
    metric: MetricName
    budget: float
    limit: float
    """Milliseconds; tokens/s of a request for throughput; unused for errors."""
    model: str | None = None
    priority: Priority | None = None
    client: str | None = None
    short_s: float = 60.0
    long_s: float = 600.0

    def missed(self, finished: RequestFinished) -> bool | None:
        """Whether a request missed it; None: it is not about that request, or says nothing of it."""
        about = self.about(finished.model_id, finished.priority, finished.client)
        if finished.outcome == "cancelled" or not about:
            return None
        if self.metric == "errors":
            return not finished.complete
        figure = self.figure(finished)
        if figure is None or not finished.complete:
            return None
        return figure < self.limit if self.metric == "throughput" else figure > self.limit

    def figure(self, finished: RequestFinished) -> float | None:
        """What is promised, of one request: milliseconds or tokens/s. None: it has none."""
        match self.metric:
            case "ttft":
                return finished.ttft_ms
            case "tpot":
                return finished.tpot_ms
            case "queue":
                return finished.queue_ms
            case "duration":
                return finished.duration_ms
            case "throughput":
                tokens = finished.usage.completion_tokens  # 0: vectors
                return 1e3 * tokens / max(finished.duration_ms, 1e-3) if tokens else None
            case "errors":
                return None
            case _:
                assert_never(self.metric)

    def say(self, figure: float) -> str:
        match self.metric:
            case "errors":
                return f"{100 * figure:.1f} %"
            case "throughput":
                return f"{figure:.1f} tok/s"
            case "ttft" | "tpot" | "queue" | "duration":
                return f"{figure:.0f} ms"
            case _:
                assert_never(self.metric)

    def plain(self, figure: float) -> float:
        """In seconds, tokens/s, or a share of requests."""
        return figure if self.metric in ("errors", "throughput") else figure / 1e3

    def about(self, model: str, priority: Priority, client: str | None) -> bool:
        """Whether it is a promise to such requests."""
        return (
            self.model in (None, model)
            and self.priority in (None, priority)
            and self.client in (None, client)
        )


_FORM = re.compile(
    r"(?P<metric>ttft|tpot|queue|duration|throughput)\s+p(?P<percent>\d+(?:\.\d+)?)\s*(?P<sign>[<>])\s*"
    r"(?P<limit>\d+(?:\.\d+)?)\s*(?P<unit>ms|s|tok/s)|errors\s*<\s*(?P<share>\d+(?:\.\d+)?)\s*%"
)
_WINDOW = re.compile(r"(?P<short>\d+)s[,/](?P<long>\d+)s")


def parse(text: str) -> Objective:
    """`ttft p95 < 500ms [model=NAME] [class=high] [key=NAME] [over=60s,600s]`, `errors < 1%`.
    `over=60s/600s` is the same, where a comma would part two items of a list.

    Raises ConfigError with the forms that there are.
    """
    words = text.split()
    options = [word for word in words if "=" in word]
    head = " ".join(word for word in words if "=" not in word)
    match = _FORM.fullmatch(head)
    if match is None:
        raise ConfigError(
            f"slo: '{text}' is none: 'ttft p95 < 500ms', 'queue p95 < 200ms', 'tpot p90 < 40ms', "
            "'duration p99 < 30s', "
            "'throughput p95 > 20tok/s' or 'errors < 1%'",
            param="slo",
        )
    return Objective(text, *_promise(text, match), **_options(text, options))


def _promise(text: str, match: re.Match[str]) -> tuple[MetricName, float, float]:
    if match["share"] is not None:
        return "errors", _within(text, float(match["share"]) / 100), 0.0
    metric, unit = match["metric"], match["unit"]
    if (metric == "throughput") != (unit == "tok/s") or (metric == "throughput") != (
        match["sign"] == ">"
    ):
        wanted = "> …tok/s" if metric == "throughput" else "< …ms or s"
        raise ConfigError(f"slo: '{text}': {metric} is '{wanted}'", param="slo")
    limit = float(match["limit"]) * (1e3 if unit == "s" else 1.0)
    names: dict[str, MetricName] = {
        "ttft": "ttft",
        "tpot": "tpot",
        "queue": "queue",
        "duration": "duration",
        "throughput": "throughput",
    }
    return names[metric], _within(text, 1 - float(match["percent"]) / 100), limit


def _within(text: str, budget: float) -> float:
    if not 0 < budget < 1:
        raise ConfigError(f"slo: '{text}' leaves no request that may miss it, or all", param="slo")
    return budget


def _options(text: str, options: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for option in options:
        name, _, value = option.partition("=")
        window = _WINDOW.fullmatch(value) if name == "over" else None
        if name == "model" and value:
            found["model"] = value
        elif name == "key" and value:
            found["client"] = value
        elif name == "class" and value.upper() in Priority.__members__:
            found["priority"] = Priority[value.upper()]
        elif window is not None and 0 < int(window["short"]) < int(window["long"]):
            found["short_s"], found["long_s"] = float(window["short"]), float(window["long"])
        else:
            raise ConfigError(
                f"slo: '{text}': '{option}' is none of model=NAME, key=NAME, class=critical|high|"
                "normal|low, over=60s,600s",
                param="slo",
            )
    return found


@dataclass(frozen=True, slots=True)
class Burn:
    """How fast the budget is used. `requests` are the short window's."""

    short: float
    long: float
    requests: int


# ------------------------------------------------------------------- states


@dataclass(frozen=True, slots=True)
class Ok:
    name = "ok"


@dataclass(frozen=True, slots=True)
class AtRisk:
    name = "at_risk"


@dataclass(frozen=True, slots=True)
class Violated:
    name = "violated"
    since_s: float


@dataclass(frozen=True, slots=True)
class Recovering:
    name = "recovering"
    violated_since_s: float
    since_s: float


State = Ok | AtRisk | Violated | Recovering


def step(state: State, burn: Burn, now_s: float) -> State:
    """The next state. Without requests enough nothing gets worse, and what is over recovers."""
    told = burn.requests >= MIN_REQUESTS
    surely = told and min(burn.short, burn.long) >= VIOLATED_AT
    match state:
        case Ok():
            if surely:
                return Violated(now_s)
            return AtRisk() if told and burn.long >= AT_RISK_AT else state
        case AtRisk():
            if surely:
                return Violated(now_s)
            return Ok() if max(burn.short, burn.long) < CALM_AT else state
        case Violated(since_s):
            return Recovering(since_s, now_s) if burn.short < AT_RISK_AT else state
        case Recovering(violated_since_s, since_s):
            if told and burn.short >= VIOLATED_AT:
                return Violated(violated_since_s)
            if burn.short >= AT_RISK_AT:
                return Recovering(violated_since_s, now_s)
            return Ok() if now_s - since_s >= RECOVERY_S else state
        case _:
            assert_never(state)


class Level:
    """One objective while it is watched."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.state: State = Ok()
        self._short, self._long = Window(objective.short_s), Window(objective.long_s)

    def add(self, finished: RequestFinished, now_s: float) -> None:
        missed = self.objective.missed(finished)
        if missed is not None:
            self._short.add(now_s, missed, self.objective.figure(finished))
            self._long.add(now_s, missed)

    def figure(self, now_s: float) -> float | None:
        """What the promised percentile is in the short window; of errors, their share. None: no requests."""
        objective = self.objective
        if objective.metric == "errors":
            requests, missed = self._short.counts(now_s)
            return missed / requests if requests else None
        slowest = objective.budget if objective.metric == "throughput" else 1 - objective.budget
        return self._short.percentile(now_s, slowest)

    def burn(self, now_s: float) -> Burn:
        requests, missed = self._short.counts(now_s)
        all_requests, all_missed = self._long.counts(now_s)
        budget = self.objective.budget
        return Burn(
            missed / max(requests, 1) / budget,
            all_missed / max(all_requests, 1) / budget,
            requests,
        )

    def look(self, now_s: float, on_change: Callable[[Level, State], None]) -> None:
        """Take the next state; `on_change` gets the level in it, and the one before."""
        before, self.state = self.state, step(self.state, self.burn(now_s), now_s)
        if before.name != self.state.name:
            on_change(self, before)


def budget_left(burn: Burn) -> float:
    """The share of the long window's budget that is unused, at least 0."""
    return max(0.0, 1.0 - burn.long)
