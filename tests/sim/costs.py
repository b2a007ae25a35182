"""What a request costs, fitted to a recorded run of a real model (benchmarks/record_run.py).

    log ttft = a0 + a1 log(prompt tokens) + a2 log(1 + running) + residual
    log tpot = b0 + b1 log(1 + running) + residual

A draw takes the two residuals of one recorded request together: they are not independent.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

RECORDED = Path(__file__).parent.parent / "data" / "recorded_run.json"


@dataclass(frozen=True, slots=True)
class Request:
    running: int
    prompt_tokens: int
    completion_tokens: int
    ttft_ms: float
    tpot_ms: float


def recorded(path: Path = RECORDED) -> list[Request]:
    rows = json.loads(path.read_text())["rows"]
    return [Request(int(r[0]), int(r[1]), int(r[2]), r[3], r[4]) for r in rows]


@dataclass(frozen=True)
class CostModel:
    ttft: tuple[float, ...]
    tpot: tuple[float, ...]
    residuals: tuple[tuple[float, float], ...]
    shapes: tuple[tuple[int, int, int], ...]
    """(running, prompt tokens, completion tokens) of the recorded requests."""

    def expected(self, running: int, prompt_tokens: int) -> tuple[float, float]:
        """Natural logs of TTFT and TPOT in ms."""
        features = _features(running, prompt_tokens)
        return (
            sum(c * f for c, f in zip(self.ttft, features, strict=True)),
            sum(c * f for c, f in zip(self.tpot, features[::2], strict=True)),
        )

    def draw(self, rng: random.Random) -> Request:
        running, prompt, completion = rng.choice(self.shapes)
        ttft, tpot = self.expected(running, prompt)
        more_ttft, more_tpot = rng.choice(self.residuals)
        return Request(
            running, prompt, completion, math.exp(ttft + more_ttft), math.exp(tpot + more_tpot)
        )


def _features(running: int, prompt_tokens: int) -> tuple[float, float, float]:
    return 1.0, math.log(prompt_tokens), math.log(1 + running)


def fit(rows: Sequence[Request]) -> CostModel:
    """By least squares."""
    x = np.array([_features(r.running, r.prompt_tokens) for r in rows])
    logs = np.log(np.array([(r.ttft_ms, r.tpot_ms) for r in rows]))
    ttft, *_ = np.linalg.lstsq(x, logs[:, 0], rcond=None)
    tpot, *_ = np.linalg.lstsq(x[:, ::2], logs[:, 1], rcond=None)
    rest = logs - np.stack([x @ ttft, x[:, ::2] @ tpot], axis=1)
    return CostModel(
        tuple(map(float, ttft)),
        tuple(map(float, tpot)),
        tuple((float(a), float(b)) for a, b in rest),
        tuple((r.running, r.prompt_tokens, r.completion_tokens) for r in rows),
    )


def held_out_error(rows: Sequence[Request]) -> tuple[float, float]:
    """Median |error| of TTFT and TPOT, as a factor minus 1, on every third request, which the fit
    has not seen."""
    model = fit([row for i, row in enumerate(rows) if i % 3])
    errors = [
        (abs(math.log(row.ttft_ms) - ttft), abs(math.log(row.tpot_ms) - tpot))
        for row in rows[::3]
        for ttft, tpot in [model.expected(row.running, row.prompt_tokens)]
    ]
    ttfts, tpots = zip(*errors, strict=True)
    return float(np.expm1(np.median(ttfts))), float(np.expm1(np.median(tpots)))
