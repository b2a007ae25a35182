"""Gaps between the tokens of running streams while a long prompt is computed beside them."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from mlx_serving.bench import client, servers

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
    """The long prompt's time to its first token."""


async def measure(folder: Path, targets_ms: Sequence[float], prompt_tokens: int) -> list[Gaps]:
    """One server after another, each with its target; 0 is none."""
    found = []
    for target_ms in targets_ms:
        flags = ("--prefix-cache-bytes", "0", "--max-itl-ms", str(target_ms))
        async with servers.serving(folder, *flags) as server:
            found.append(await _gaps(server, target_ms, prompt_tokens))
    return found


async def _gaps(server: servers.Server, target_ms: float, prompt_tokens: int) -> Gaps:
    rng = random.Random(4)

    def body(length: int, max_tokens: int) -> dict[str, Any]:
        prompt = [rng.randrange(100, 40_000) for _ in range(length)]
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
    gaps = sorted(
        b - a for times in arrivals for a, b in pairwise(times) if began_s <= b <= ended_s
    )
    assert gaps, "the streams had ended"
    at_99 = gaps[int(0.99 * (len(gaps) - 1))]
    return Gaps(
        target_ms,
        gaps[len(gaps) // 2] * 1e3,
        at_99 * 1e3,
        gaps[-1] * 1e3,
        ended_s - began_s,
    )


async def _watch(server: servers.Server, body: dict[str, Any], times: list[float]) -> None:
    await client.stream(
        server.host,
        server.port,
        "/v1/completions",
        body,
        on_token=lambda: times.append(time.perf_counter()),
    )
