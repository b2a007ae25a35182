"""Whole rollouts, simulated: a worker whose two models take turns in steps that a recorded run gives the
cost of, a variant that is slower by a known factor, and the decisions of `traffic.rollout`.

Each round of the worker has one step of each model that has sequences; a model's step takes longer the
more sequences share it, and every sequence waits for both. So the arm with the smaller share is measured
in smaller batches, and beside the other model's steps more often. Between two events (an arrival, the
end of a prompt, the end of an answer) all rounds are alike, and are added up at once.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from mlx_serving.telemetry.events import Company, Met, RequestFinished
from mlx_serving.traffic.rollout import (
    STAGES,
    Advance,
    Figures,
    Promote,
    RollBack,
    Stage,
    decide,
)
from mlx_serving.traffic.rollouts import measured
from mlx_serving.traffic.routing import takes_part
from mlx_serving.types import Usage
from sim.costs import CostModel

LOOK_EVERY = 100
"""Requests between two looks; the server looks after each."""
RATE_PER_S = 0.5
"""At a share of a tenth the variant's steps have 1.5 sequences, and the model's 4.9."""
CHUNK_MS = 100.0
"""Of prefill in a round of each model."""

Measure = Callable[[RequestFinished], Mapping[str, float] | None]


@dataclass(frozen=True, slots=True)
class Ended:
    stage: int
    """Index of the one in which it ended."""
    rolled_back: RollBack | None
    requests: int


@dataclass(slots=True)
class _Request:
    variant: bool
    prompt_tokens: int
    tokens: int
    residual: tuple[float, float]
    """Of log TTFT and TPOT: what the cost model does not explain."""
    arrived_ms: float
    prefill_rounds: int
    chunk_ms: float
    first_ms: float = 0.0
    since: tuple[int, int, int, float] = (0, 0, 0, 0.0)
    """Its model's rounds, the sequences in them and beside them, and the other's time when this part of it
    began."""
    first: Met | None = None


@dataclass(slots=True)
class _Model:
    slower: float
    prefilling: list[_Request] = field(default_factory=list)
    """The first one's chunk is in each round."""
    waiting: list[_Request] = field(default_factory=list)
    """For a row."""
    decoding: int = 0
    rounds: int = 0
    sequences: int = 0
    beside: int = 0
    own_ms: float = 0.0


class Worker:
    """Serves requests one after another; `serve` yields them as they finish."""

    def __init__(
        self, rng: random.Random, costs: CostModel, slower: float, failing: float, rows: int
    ) -> None:
        self._rng, self._costs, self._failing, self._rows = rng, costs, failing, rows
        self._models = (_Model(1.0), _Model(slower))
        self._rounds = self._now_ms = 0.0
        self._numbers = 0
        self._ends: list[tuple[float, int, _Request]] = []
        """Answers, by the round in which they end."""
        self._steps_ms = [math.exp(costs.expected(max(0, n - 1), 1)[1]) for n in range(400)]

    def serve(
        self, is_variant: Callable[[int], bool]
    ) -> Iterator[tuple[float, bool, RequestFinished]]:
        """(now in seconds, of the variant, what finished). `is_variant(number)` is asked as a request
        arrives."""
        arrives_ms = 0.0
        while True:
            arrives_ms += 1e3 * self._rng.expovariate(RATE_PER_S)
            for variant, finished in self._until(arrives_ms):
                yield self._now_ms / 1e3, variant, finished
            self._numbers += 1
            self._arrive(is_variant(self._numbers))

    def _arrive(self, variant: bool) -> None:
        rng, costs = self._rng, self._costs
        _, prompt, tokens = rng.choice(costs.shapes)
        work_ms = math.exp(costs.expected(0, prompt)[0])
        rounds = math.ceil(work_ms / CHUNK_MS)
        request = _Request(
            variant,
            prompt,
            tokens,
            rng.choice(costs.residuals),
            self._now_ms,
            rounds,
            work_ms / rounds,
        )
        request.since = self._met(variant)
        self._models[variant].waiting.append(request)
        self._admit(self._models[variant])

    def _admit(self, model: _Model) -> None:
        while model.waiting and model.decoding + len(model.prefilling) < self._rows:
            model.prefilling.append(model.waiting.pop(0))

    def _until(self, end_ms: float) -> Iterator[tuple[bool, RequestFinished]]:
        while True:
            each = [self._step_ms(model) for model in self._models]
            round_ms = sum(each)
            if not round_ms:
                self._now_ms = end_ms
                return
            left = self._ends[0][0] - self._rounds if self._ends else math.inf
            for model in self._models:
                if model.prefilling:
                    left = min(left, model.prefilling[0].prefill_rounds)
            # A round that has begun is finished: who comes meanwhile joins the next.
            rounds = min(left, max(1.0, math.ceil((end_ms - self._now_ms) / round_ms)))
            self._advance(rounds, each)
            yield from self._finish()
            if self._now_ms >= end_ms:
                return

    def _step_ms(self, model: _Model) -> float:
        chunk_ms = model.prefilling[0].chunk_ms if model.prefilling else 0.0
        decode_ms = self._steps_ms[model.decoding] if model.decoding else 0.0
        return model.slower * (chunk_ms + decode_ms)

    def _advance(self, rounds: float, each: list[float]) -> None:
        self._rounds += rounds
        self._now_ms += rounds * sum(each)
        for model, step_ms in zip(self._models, each, strict=True):
            if step_ms:
                model.own_ms += rounds * step_ms
                model.rounds += int(rounds)
                model.sequences += int(rounds) * (model.decoding + len(model.prefilling))
                model.beside += int(rounds) * len(model.waiting)
            if model.prefilling:
                model.prefilling[0].prefill_rounds -= int(rounds)

    def _finish(self) -> Iterator[tuple[bool, RequestFinished]]:
        for model in self._models:
            if model.prefilling and not model.prefilling[0].prefill_rounds:
                request = model.prefilling.pop(0)
                request.first, request.first_ms = self._since(request, True), self._now_ms
                request.since = self._met(request.variant)
                model.decoding += 1
                end = self._rounds + request.tokens - 1
                heapq.heappush(self._ends, (end, id(request), request))
        while self._ends and self._ends[0][0] <= self._rounds:
            request = heapq.heappop(self._ends)[2]
            self._models[request.variant].decoding -= 1
            self._admit(self._models[request.variant])
            yield request.variant, self._finished(request)

    def _met(self, variant: bool) -> tuple[int, int, int, float]:
        own, other = self._models[variant], self._models[not variant]
        return own.rounds, own.sequences, own.beside, other.own_ms

    def _since(self, request: _Request, waiting: bool = False) -> Met:
        now = self._met(request.variant)
        rounds, running, beside, others_ms = (
            b - a for a, b in zip(request.since, now, strict=True)
        )
        sequences = running + beside if waiting else running
        return Met(others_ms, sequences / rounds if rounds else 1.0)

    def _finished(self, request: _Request) -> RequestFinished:
        """Noise is the machine's: it stretches other models' steps as it does the request's own."""
        rng, after = self._rng, self._since(request)
        on_ttft, on_tpot = (math.exp(r) for r in request.residual)
        ttft_ms = on_ttft * (request.first_ms - request.arrived_ms)
        rest_ms = on_tpot * (self._now_ms - request.first_ms)
        assert request.first is not None
        first = Met(on_ttft * request.first.others_ms, request.first.sequences)
        failed = rng.random() < self._failing
        return RequestFinished(
            request_id="r",
            model_id="m",
            outcome="worker_died" if failed else rng.choice(("stop", "stop", "length")),
            usage=Usage(prompt_tokens=request.prompt_tokens, completion_tokens=request.tokens),
            ttft_ms=ttft_ms,
            tpot_ms=rest_ms / (request.tokens - 1) if request.tokens > 1 else None,
            duration_ms=ttft_ms + rest_ms,
            company=Company(first, Met(on_tpot * after.others_ms, after.sequences)),
        )


def simulate(
    costs: CostModel,
    seed: int,
    slower: float,
    *,
    failing: float = 0.002,
    measure: Measure = measured,
    stages: Sequence[Stage] = STAGES,
    rows: int = 1000,
) -> Ended:
    """One rollout of a variant whose every step takes `slower` times as long as the model's.

    `rows`: sequences of each model that are computed at once; the others wait.
    """
    rng = random.Random(seed)
    figures, stage, began_s = Figures(), 0, 0.0
    worker = Worker(rng, costs, slower, failing, rows)

    def is_variant(number: int) -> bool:
        return takes_part(f"rollout {seed}", f"user {number}", stages[stage].share)

    for number, (now_s, variant, finished) in enumerate(worker.serve(is_variant), 1):
        values = measure(finished)
        assert values is not None
        figures.add(stage, variant, values)
        if number % LOOK_EVERY:
            continue
        match decide(stages, stage, now_s - began_s, figures):
            case Advance(to):
                stage, began_s = to, now_s
            case Promote():
                return Ended(stage, None, number)
            case RollBack() as why:
                return Ended(stage, why, number)
    raise AssertionError("a rollout that never ends")
