"""Whole rollouts, simulated: requests whose costs a recorded run gives, a variant that is slower by a
known factor, and the decisions of `traffic.rollout`."""

from __future__ import annotations

import random
from dataclasses import dataclass

from mlx_serving.telemetry.events import RequestFinished
from mlx_serving.traffic.rollout import (
    STAGES,
    Advance,
    Figures,
    Promote,
    RollBack,
    decide,
)
from mlx_serving.traffic.rollouts import measured
from mlx_serving.traffic.routing import takes_part
from mlx_serving.types import Usage
from sim.costs import CostModel

LOOK_EVERY = 25
"""Requests between two looks; the server looks after each."""
RATE_PER_S = 5.0


@dataclass(frozen=True, slots=True)
class Ended:
    stage: int
    """Index of the one in which it ended."""
    rolled_back: RollBack | None
    requests: int


def simulate(costs: CostModel, seed: int, slower: float, *, failing: float = 0.002) -> Ended:
    """One rollout of a variant whose every latency is `slower` times the model's."""
    rng = random.Random(seed)
    figures, stage, began_s, now_s = Figures(), 0, 0.0, 0.0
    for number in range(1, 100_000):
        now_s += rng.expovariate(RATE_PER_S)
        variant = takes_part(f"rollout {seed}", f"user {number}", STAGES[stage].share)
        finished = _answer(rng, costs, slower if variant else 1.0, failing)
        values = measured(finished)
        assert values is not None
        figures.add(stage, variant, values)
        if number % LOOK_EVERY:
            continue
        match decide(STAGES, stage, now_s - began_s, figures):
            case Advance(to):
                stage, began_s = to, now_s
            case Promote():
                return Ended(stage, None, number)
            case RollBack() as why:
                return Ended(stage, why, number)
    raise AssertionError("a rollout that never ends")


def _answer(rng: random.Random, costs: CostModel, slower: float, failing: float) -> RequestFinished:
    cost = costs.draw(rng)
    ttft_ms, tpot_ms = cost.ttft_ms * slower, cost.tpot_ms * slower
    tokens = cost.completion_tokens
    return RequestFinished(
        request_id="r",
        model_id="m",
        outcome="worker_died" if rng.random() < failing else rng.choice(("stop", "stop", "length")),
        usage=Usage(prompt_tokens=cost.prompt_tokens, completion_tokens=tokens),
        ttft_ms=ttft_ms,
        tpot_ms=tpot_ms,
        duration_ms=ttft_ms + tokens * tpot_ms,
    )
