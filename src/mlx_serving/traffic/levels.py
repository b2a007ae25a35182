"""Service levels that are watched, and the hand that applies remedies: the shell around `slo.step`
and `remedies.choose`."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol, assert_never

import msgspec

from mlx_serving import clock
from mlx_serving.config import Remedy
from mlx_serving.telemetry.events import RequestFinished
from mlx_serving.traffic.remedies import (
    Applied,
    Apply,
    TakeBack,
    Wait,
    Watched,
    choose,
    hold_after,
)
from mlx_serving.traffic.slo import (
    Burn,
    Level,
    Objective,
    Ok,
    Recovering,
    State,
    Violated,
    budget_left,
)
from mlx_serving.types import Priority

log = logging.getLogger(__name__)

TICK_S = 1.0


class LevelChanged(msgspec.Struct, frozen=True, kw_only=True):
    """An objective got better or worse, or a remedy was applied or taken back because of it."""

    objective: str
    state: str
    before: str
    burn_short: float
    burn_long: float
    now: str | None = None
    """What the promised percentile is; None: there are no requests."""
    remedy: Remedy | None = None
    act: Literal["applied", "taken_back", "would_apply"] | None = None

    @property
    def line(self) -> str:
        now = f"now {self.now}; " if self.now else ""
        figures = f"{now}burn rate {self.burn_short:.1f} short, {self.burn_long:.1f} long"
        if self.act is None:
            return f"'{self.objective}' is {self.state}, was {self.before} ({figures})"
        return f"{self.remedy} {self.act.replace('_', ' ')} for '{self.objective}' ({figures})"


class Hands(Protocol):
    """What remedies can do."""

    def narrow(self, shed_from: Priority | None, halvings: int) -> None:
        """Refuse requests of that class and below, and let in 1 / 2**halvings of those that may be
        open at once."""
        ...

    def tune(self, chunk_halvings: int, ceiling_steps: int) -> None:
        """Prefill in 1 / 2**chunk_halvings of the tokens a step; more sequences at once where
        `ceiling_steps` is above 0, fewer where it is below."""
        ...

    def favour(self, objectives: Sequence[Objective]) -> None:
        """Have the requests that these are about go one class higher, for each of them."""
        ...

    def keep_out(self, models: int) -> None:
        """Have so many models that nobody uses out of memory; those beyond come back."""
        ...

    def roll_back(self) -> None:
        """End every running rollout."""
        ...

    def can(self, remedy: Remedy) -> bool:
        """Whether it would do anything now."""
        ...


class Levels:
    """Args: ladder: remedies in the order in which they are tried; none: levels are only watched.
    dry_run: say what would be done, and do nothing. on_change: must not raise."""

    def __init__(
        self,
        objectives: Sequence[Objective],
        hands: Hands,
        *,
        ladder: Sequence[Remedy] = (),
        dry_run: bool = False,
        on_change: Callable[[LevelChanged], None] = lambda _: None,
        now: clock.Clock = clock.monotonic,
    ) -> None:
        self._levels = [Level(objective) for objective in objectives]
        self._hands = hands
        self._ladder = ladder
        self._dry_run = dry_run
        self._on_change = on_change
        self._now = now
        self._applied: list[Applied] = []
        self._last_act_s = self._taken_back_s = -math.inf
        self._calm_since_s = now()
        self._previous: Applied | None = None

    @property
    def applied(self) -> tuple[Remedy, ...]:
        return tuple(one.remedy for one in self._applied)

    def observe(self, finished: RequestFinished) -> None:
        now_s = self._now()
        for level in self._levels:
            level.add(finished, now_s)

    def tick(self) -> None:
        """Look at every level and do at most one thing about them."""
        now_s = self._now()
        for level in self._levels:
            level.look(now_s, self._changed)
        if any(isinstance(level.state, Violated) for level in self._levels):
            self._calm_since_s = now_s
        self._act(now_s)

    def end(self) -> None:
        """Nobody looks any more: who was told of a violation is told that, too."""
        for level in self._levels:
            if isinstance(level.state, Violated | Recovering):
                self._publish(level, before=level.state.name, state="unwatched")

    def report(self) -> list[dict[str, object]]:
        """For /health: each objective with its state and burn rates, and the remedies in force."""
        now_s = self._now()
        return [self._row(level, now_s) for level in self._levels]

    def burns(self) -> Mapping[str, Burn]:
        now_s = self._now()
        return {level.objective.text: level.burn(now_s) for level in self._levels}

    def figures(self) -> Mapping[str, float]:
        """What the promised percentiles are, where there are requests: seconds, tokens/s, or a share."""
        now_s = self._now()
        return {
            level.objective.text: level.objective.plain(figure)
            for level in self._levels
            if (figure := level.figure(now_s)) is not None
        }

    def _row(self, level: Level, now_s: float) -> dict[str, object]:
        burn = level.burn(now_s)
        return {
            "objective": level.objective.text,
            "state": level.state.name,
            "now": _now(level, now_s),
            "burn_short": round(burn.short, 3),
            "burn_long": round(burn.long, 3),
            "budget_left": round(budget_left(burn), 3),
            "remedies": [a.remedy for a in self._applied if a.because == level.objective.text],
        }

    def _act(self, now_s: float) -> None:
        act = choose(
            [Watched(x.objective.text, x.objective.metric, x.state) for x in self._levels],
            [remedy for remedy in self._ladder if self._hands.can(remedy)],
            self._applied,
            now_s=now_s,
            last_act_s=self._last_act_s,
            calm_since_s=self._calm_since_s,
        )
        match act:
            case Wait():
                return
            case Apply(remedy, because):
                long_s = self._level(because).objective.long_s
                hold_s = hold_after(self._previous, now_s, self._taken_back_s, long_s)
                self._applied.append(Applied(remedy, because, now_s, hold_s))
                self._say(because, remedy, "would_apply" if self._dry_run else "applied")
            case TakeBack(applied):
                self._applied.remove(applied)
                self._previous, self._taken_back_s = applied, now_s
                self._say(applied.because, applied.remedy, "taken_back")
            case _:
                assert_never(act)
        self._last_act_s = now_s
        if not self._dry_run:
            self._put_into_force(act)

    def _put_into_force(self, act: Apply | TakeBack) -> None:
        """Everything in force, said anew: what is taken back may not be the last of its kind."""
        if isinstance(act, Apply) and act.remedy == "roll_back":
            self._hands.roll_back()
        in_force = self.applied
        raised = [one.because for one in self._applied if one.remedy == "raise_class"]
        self._hands.favour([self._level(text).objective for text in raised])
        lowest = {"shed_normal": Priority.NORMAL, "shed_low": Priority.LOW}
        shed_from = next((p for name, p in lowest.items() if name in in_force), None)
        self._hands.narrow(shed_from, in_force.count("limit_admission"))
        ceiling_steps = in_force.count("raise_ceiling") - in_force.count("lower_ceiling")
        self._hands.tune(in_force.count("smaller_chunks"), ceiling_steps)
        self._hands.keep_out(in_force.count("evict_idle"))

    def _level(self, text: str) -> Level:
        return next(level for level in self._levels if level.objective.text == text)

    def _changed(self, level: Level, before: State) -> None:
        self._publish(level, before=before.name)

    def _say(
        self, because: str, remedy: Remedy, act: Literal["applied", "taken_back", "would_apply"]
    ) -> None:
        level = self._level(because)
        self._publish(level, before=level.state.name, remedy=remedy, act=act)

    def _publish(
        self,
        level: Level,
        *,
        before: str,
        state: str | None = None,
        remedy: Remedy | None = None,
        act: Literal["applied", "taken_back", "would_apply"] | None = None,
    ) -> None:
        now_s = self._now()
        burn = level.burn(now_s)
        change = LevelChanged(
            objective=level.objective.text,
            state=state or level.state.name,
            before=before,
            burn_short=burn.short,
            burn_long=burn.long,
            now=_now(level, now_s),
            remedy=remedy,
            act=act,
        )
        worse = act is not None or not isinstance(level.state, Ok)
        log.log(logging.WARNING if worse else logging.INFO, "%s", change.line)
        self._on_change(change)


def _now(level: Level, now_s: float) -> str | None:
    figure = level.figure(now_s)
    return None if figure is None else level.objective.say(figure)
