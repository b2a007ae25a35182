"""Gaps between the tokens of running streams while a long prompt is computed beside them."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from mlx_serving.bench import client, servers, workloads

STREAMS = 8
MAX_TOKENS = 2000


@dataclass(frozen=True, slots=True)
class Gaps:
    target_ms: float
    """0: none was set."""
    p50_ms: float
    p99_ms: float
    most_ms: float
    prompt_s: float
    """The long prompt's time to its first token, median of the rounds."""


@dataclass(frozen=True, slots=True)
class _Round:
    gaps_s: list[float]
    prompt_s: float


async def measure(
    folder: Path, targets_ms: Sequence[float], prompt_tokens: int, rounds: int
) -> list[Gaps]:
    """One server after another, each with its target; 0 is none. In every round each has its turn."""
    found: dict[float, list[_Round]] = {target_ms: [] for target_ms in targets_ms}
    for number in range(rounds):
        for target_ms, before in found.items():
            async with servers.serving(folder, "--max-itl-ms", str(target_ms)) as server:
                before.append(await _round(server, prompt_tokens, number))
    return [_summary(target_ms, runs) for target_ms, runs in found.items()]


def _summary(target_ms: float, runs: Sequence[_Round]) -> Gaps:
    """Over all rounds' gaps; the longest is the median of the rounds' longest."""
    gaps = sorted(gap for run in runs for gap in run.gaps_s)
    return Gaps(
        target_ms,
        statistics.median(gaps) * 1e3,
        gaps[int(0.99 * (len(gaps) - 1))] * 1e3,
        statistics.median(max(run.gaps_s) for run in runs) * 1e3,
        statistics.median(run.prompt_s for run in runs),
    )


async def _round(server: servers.Server, prompt_tokens: int, seed: int) -> _Round:
    rng = random.Random(seed)

    def body(length: int, max_tokens: int) -> dict[str, Any]:
        prompt = workloads.token_ids(rng, length)
        sampling = {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        return {"model": "bench", "prompt": prompt, **sampling}

    arrivals: list[list[float]] = [[] for _ in range(STREAMS)]
    streams = [
        asyncio.create_task(_watch(server, body(20, MAX_TOKENS), times)) for times in arrivals
    ]
    # The pace is learnt from a prompt before, as in a server that has run for a while.
    await client.stream(server.host, server.port, "/v1/completions", body(600, 1))
    began_s = time.perf_counter()
    await client.stream(server.host, server.port, "/v1/completions", body(prompt_tokens, 1))
    ended_s = time.perf_counter()
    for task in streams:
        task.cancel()
    await asyncio.gather(*streams, return_exceptions=True)
    gaps = [b - a for times in arrivals for a, b in pairwise(times) if began_s <= b <= ended_s]
    assert gaps, "the streams had ended"
    return _Round(gaps, ended_s - began_s)


async def _watch(server: servers.Server, body: dict[str, Any], times: list[float]) -> None:
    await client.stream(
        server.host,
        server.port,
        "/v1/completions",
        body,
        on_token=lambda: times.append(time.perf_counter()),
    )
