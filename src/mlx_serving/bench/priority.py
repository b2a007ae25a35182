"""Critical requests beside twice the load that there is room for: how long they wait for their first token,
and what they cost the others."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from mlx_serving.bench import client, servers, workloads

OTHERS = (64, 48)
"""Prompt and answer tokens."""
CRITICAL = (300, 16)
CRITICAL_SHARE = 0.15
"""Of the capacity, in critical requests: they overlap one another now and then."""
OVERLOAD = 2.0


@dataclass(slots=True)
class Load:
    """What one load of the server came to."""

    ttfts_s: list[float] = field(default_factory=list)
    """Of critical requests."""
    tokens: int = 0
    """Of prompts that were computed and of answers, of all requests."""
    seconds: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True, slots=True)
class Priorities:
    flags: str
    critical: int
    """Requests under load."""
    quiet_s: tuple[float, float]
    """TTFT of critical requests alone, p50 and p99; medians over rounds."""
    loaded_s: tuple[float, float]
    ratio: float
    """Of the two p99; the median over rounds."""
    throughput: float
    """Tokens/s with critical requests over those without; the median over rounds."""
    capacity: float
    """Other requests a second."""


async def measure(
    folder: Path, *, rounds: int, seconds: float, flags: Sequence[str] = ()
) -> Priorities:
    """Critical ones alone, the others alone, and both together, in turn."""
    rng = random.Random(6)
    async with servers.serving(folder, *flags) as server:
        capacity = await _capacity(server, rng)
        loads: list[tuple[Load, Load, Load]] = []
        for _ in range(rounds):
            quiet = await _load(server, rng, seconds, critical=CRITICAL_SHARE * capacity)
            others = await _load(server, rng, seconds, others=OVERLOAD * capacity)
            both = await _load(
                server,
                rng,
                seconds,
                critical=CRITICAL_SHARE * capacity,
                others=OVERLOAD * capacity,
            )
            loads.append((quiet, others, both))
    quiets, alones, boths = zip(*loads, strict=True)
    ratios = [_at(b, 0.99) / _at(q, 0.99) for q, b in zip(quiets, boths, strict=True)]
    throughputs = [b.tokens_per_s / a.tokens_per_s for a, b in zip(alones, boths, strict=True)]
    return Priorities(
        " ".join(flags),
        sum(len(load.ttfts_s) for load in boths),
        (median(_at(q, 0.5) for q in quiets), median(_at(q, 0.99) for q in quiets)),
        (median(_at(b, 0.5) for b in boths), median(_at(b, 0.99) for b in boths)),
        median(ratios),
        median(throughputs),
        capacity,
    )


def _at(load: Load, quantile: float) -> float:
    if not load.ttfts_s:
        raise RuntimeError("no critical request came in that time: more --seconds")
    ordered = sorted(load.ttfts_s)
    return ordered[min(len(ordered) - 1, int(quantile * len(ordered)))]


async def _capacity(server: servers.Server, rng: random.Random) -> float:
    """Requests a second of a server whose rows are always full."""
    ended: list[float] = []

    async def one_after_another() -> None:
        while True:
            await _ask(server, rng, OTHERS, "normal")
            ended.append(time.perf_counter())

    tasks = [asyncio.create_task(one_after_another()) for _ in range(32)]
    while len(ended) < 96:  # noqa: ASYNC110 - nothing signals it
        await asyncio.sleep(0.05)
    await _end(tasks)
    return 64 / (ended[95] - ended[31])  # without the beginning, when rows fill


async def _load(
    server: servers.Server,
    rng: random.Random,
    seconds: float,
    *,
    critical: float = 0.0,
    others: float = 0.0,
) -> Load:
    """Requests that come at random, so many a second, for so long."""
    load, tasks = Load(), list[asyncio.Task[None]]()

    async def urgent() -> None:
        came_s = time.perf_counter()
        first = itertools.count()

        def on_token() -> None:
            load.tokens += 1
            if next(first) == 0:
                load.ttfts_s.append(time.perf_counter() - came_s)
                load.tokens += CRITICAL[0]

        await _ask(server, rng, CRITICAL, "critical", on_token)

    async def other(priority: str) -> None:
        first = itertools.count()

        def on_token() -> None:
            load.tokens += 1 if next(first) else 1 + OTHERS[0]

        await _ask(server, rng, OTHERS, priority, on_token)

    async def arrivals(per_s: float, begin: Callable[[], Any]) -> None:
        while per_s:
            await asyncio.sleep(rng.expovariate(per_s))
            tasks.append(asyncio.create_task(begin()))

    if others:  # the rows are full when the measurement begins
        tasks += [asyncio.create_task(other("normal")) for _ in range(48)]
        await asyncio.sleep(min(5.0, seconds / 4))
        load.tokens = 0
    began_s = time.perf_counter()
    arriving = [
        asyncio.create_task(arrivals(critical, urgent)),
        asyncio.create_task(arrivals(others, lambda: other(rng.choice(("normal", "low"))))),
    ]
    await asyncio.sleep(seconds)
    load.seconds = time.perf_counter() - began_s
    counted = load.tokens
    await _end([*arriving, *tasks])
    load.tokens = counted
    while await _open(server):  # noqa: ASYNC110 - those that were cut off leave first
        await asyncio.sleep(0.05)
    return load


async def _open(server: servers.Server) -> bool:
    _, body = await client.get(server.host, server.port, "/health")
    return b'"open_requests":0' not in body


async def _ask(
    server: servers.Server,
    rng: random.Random,
    shape: tuple[int, int],
    priority: str,
    on_token: Callable[[], None] = lambda: None,
) -> None:
    prompt = workloads.token_ids(rng, shape[0])
    sampling = {"max_tokens": shape[1], "temperature": 0, "ignore_eos": True}
    body = {"model": "bench", "prompt": prompt, "priority": priority, **sampling}
    await client.stream(server.host, server.port, "/v1/completions", body, on_token=on_token)


async def _end(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
