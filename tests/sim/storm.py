"""The simulation with many more deaths, and with poisons: requests whose begin ends the worker.

`worker.blame` decides, as it does for the supervisor, who goes on at once, who is tried alone and
who is given up.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

from mlx_serving.runtime.core.plan import StepPlan
from mlx_serving.runtime.core.scheduler import Emitted
from mlx_serving.runtime.core.sequence import Sequence
from mlx_serving.types import Priority
from mlx_serving.worker import blame
from sim.scenario import Request
from sim.simulation import Simulation

LIMIT = 3


class Death(Exception):
    """The worker dies before the step that it has just announced."""


class Storm(Simulation):
    """`deaths` more of them at random times, or `poisons` of the requests are such. Random deaths
    give nobody up (there is no limit): whom they hit thrice in a row as it begins is no poison."""

    def __init__(
        self,
        seed: int,
        *,
        deaths: int = 0,
        poisons: int = 0,
        log: Callable[[str], None] | None = None,
    ) -> None:
        self._limit = LIMIT if poisons else 10**9
        self._on_trial: Request | None = None
        self._held: list[Request] | None = None
        """Who waits until the suspects have been tried; None: nobody has to."""
        super().__init__(seed, log)
        rng = random.Random(seed ^ 0x57047)
        ids = sorted(self._requests)
        self.poisons = set(rng.sample(ids, min(poisons, len(ids))))
        self.given_up: set[int] = set()
        self._suspects: list[Request] = []
        horizon_s = max(r.arrives_s for r in self.scenario.requests) + 20.0
        for _ in range(deaths):
            self._at(rng.uniform(0, horizon_s), self._die)

    def _plan_events(self) -> None:
        if self._limit == LIMIT:
            self.scenario.deaths_s.clear()  # a long prompt may well meet three
        super()._plan_events()

    def _launch(self) -> bool:
        try:
            return super()._launch()
        except Death:
            self._die()
            return True

    def _step(self) -> None:
        # A death may leave nothing to do but to wait for the next event.
        if self._scheduler.has_work:
            super()._step()

    def _observe(self, plan: StepPlan, before: list[Sequence]) -> None:
        super()._observe(plan, before)
        starts = [start.seq_id for start in plan.starts]
        for seq_id in starts:
            self._requests[seq_id].starting = True
        if self.poisons.intersection(starts):
            raise Death

    def _receive(self, got: Emitted) -> None:
        super()._receive(got)
        request = self._requests[got.seq_id]
        blame.acquit(request)
        if request is self._on_trial:
            if request.paused and request.live:
                self._scheduler.pause(request.seq_id)
            self._try_next()

    def _take_refused(self) -> None:
        super()._take_refused()
        if self._on_trial is not None and self._on_trial.refused:
            self._try_next()

    def _cancel(self, request: Request) -> None:
        if request.seq_id in self.given_up:
            return
        for waiting in (self._suspects, self._held or []):
            if request in waiting:
                waiting.remove(request)
                request.cancelled = True
                self.report.cancelled += 1
                return
        super()._cancel(request)
        if request is self._on_trial:
            self._try_next()

    def _die(self) -> None:
        self.report.deaths += 1
        self.report.disturbances += 1
        self._begin_anew()
        verdict = blame.judge(self._living(), self._limit)
        self._log(
            f"{self._now_s:8.1f} worker dies; suspects {[r.seq_id for r in verdict.suspects]}"
        )
        for request in verdict.guilty:
            self.given_up.add(request.seq_id)
            request.cancelled = True
        self._held = [] if blame.go_alone(verdict.suspects, self._limit) else None
        for request in verdict.free:
            self._add(request)
            if request.paused:
                self._scheduler.pause(request.seq_id)
        self._suspects = verdict.suspects
        self._try_next()

    def _add(self, request: Request, priority: Priority | None = None) -> None:
        tried = request is self._on_trial
        if self._held is None or tried or request.tokens or request.seq_id not in self._oracles:
            super()._add(request, priority)
        else:
            self._held.append(request)

    def _living(self) -> Iterable[Request]:
        return sorted((r for r in self._requests.values() if r.live), key=lambda r: r.arrives_s)

    def _try_next(self) -> None:
        self._on_trial = self._suspects.pop(0) if self._suspects else None
        if self._on_trial is not None:
            self._add(self._on_trial, Priority.CRITICAL)
            return
        held, self._held = self._held or [], None
        for request in held:
            self._add(request)
            if request.paused:
                self._scheduler.pause(request.seq_id)
