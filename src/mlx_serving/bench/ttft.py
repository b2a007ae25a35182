"""Where the time to a first token goes, and what each stage's preparation is worth, on and off.

A round is `PROMPTS` requests that arrive together beside `STREAMS` running streams, each a common text
of some thousand characters and a question of its own, held to a large JSON schema. Stages are the
server's own figures (`/metrics`).
"""

from __future__ import annotations

import asyncio
import json
import re
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from mlx_serving.bench import client, servers
from mlx_serving.types import Prepared

PROMPTS, STREAMS, FIELDS = 8, 2, 80
_COMMON = " ".join(f"Rule {i}: answer question {i} before question {i + 1}." for i in range(120))
_STAGE = re.compile(
    r'^mlx_serving_ttft_stage_seconds_(sum|count)\{.*stage="(\w+)".*\} (\S+)$', re.MULTILINE
)
STAGES = ("tokenise", "grammar", "hash", "queue", "disk", "prefill")


@dataclass(slots=True)
class Way:
    """One way of serving, and what was measured of it. `against`: the way that differs in one thing."""

    name: str
    against: Way | None = None
    unprepared: tuple[Prepared, ...] = ()
    own_schemas: bool = False
    """Each request has another schema."""
    cache: str = "disk"
    """Where prefixes are kept: "disk" (and memory), "memory" or ""."""
    ttfts_s: list[float] = field(default_factory=list)
    """Of each round, the median over its requests."""
    gaps_s: list[float] = field(default_factory=list)
    """Of each round, the longest between two tokens of a running stream while a request waited."""
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)

    def stage_ms(self, stage: str) -> float | None:
        """The mean over all requests; None: none had it."""
        count = self.counts.get(stage, 0.0)
        return 1e3 * self.sums[stage] / count if count else None


@dataclass(frozen=True, slots=True)
class Pipeline:
    ways: list[Way]
    rounds: int
    took_s: float


def _ways() -> list[Way]:
    on = Way("all on")
    own = Way("a schema each", on, own_schemas=True)
    return [
        on,
        Way("tokenised on the event loop", on, ("tokenise",)),
        own,
        Way("a schema each, compiled in the step loop", own, ("grammar",), own_schemas=True),
        Way("hashed in its turn", on, ("hash",)),
        Way("prefix not on disk", on, cache="memory"),
        Way("no prefix cache", on, cache=""),
    ]


async def measure(folder: Path, rounds: int) -> Pipeline:
    """In every round each way has its turn, with a server that was just started; blocks on disk are those
    of a server before all of them."""
    began_s = time.perf_counter()
    ways = _ways()
    with tempfile.TemporaryDirectory() as scratch:
        await _round(Way("before"), folder, Path(scratch))
        for number in range(rounds):
            # Who comes first in a round is another one each time.
            first = number % len(ways)
            for way in ways[first:] + ways[:first]:
                await _round(way, folder, Path(scratch))
    return Pipeline(ways, rounds, time.perf_counter() - began_s)


async def _round(way: Way, folder: Path, scratch: Path) -> None:
    port = servers.free_port()
    command = servers.ours("--config", str(_config(way, folder, scratch)), "--port", str(port))
    async with servers.running("ours", command, port=port, ready="/ready") as server:
        arrivals: list[list[float]] = [[] for _ in range(STREAMS)]
        run = [asyncio.Event() for _ in arrivals]
        streams = [
            asyncio.create_task(_run(server, times, runs))
            for times, runs in zip(arrivals, run, strict=True)
        ]
        async with asyncio.timeout(60):
            for runs in run:
                await runs.wait()
        began_s = time.perf_counter()
        asked = [
            client.stream(
                server.host, server.port, "/v1/completions", _body(i, i if way.own_schemas else 0)
            )
            for i in range(PROMPTS)
        ]
        timings = await asyncio.gather(*asked)
        until_s = began_s + max(timing.ttft_s for timing in timings)
        for task in streams:
            task.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
        _, page = await client.get(server.host, server.port, "/metrics")
    gaps = [
        b - a for times in arrivals for a, b in pairwise(times) if began_s <= b and a <= until_s
    ]
    assert gaps, "the running streams had ended"
    way.ttfts_s.append(statistics.median(timing.ttft_s for timing in timings))
    way.gaps_s.append(max(gaps))
    for kind, stage, value in _STAGE.findall(page.decode()):
        into = way.sums if kind == "sum" else way.counts
        into[stage] = into.get(stage, 0.0) + float(value)


def _config(way: Way, folder: Path, scratch: Path) -> Path:
    """YAML has JSON in it."""
    model: dict[str, Any] = {"model": str(folder), "name": "bench", "unprepared": way.unprepared}
    if way.cache == "disk":
        model["kv_disk_path"] = str(scratch / "blocks")
    elif not way.cache:
        model["prefix_cache_bytes"] = 0
    path = scratch / "serve.yaml"
    path.write_text(json.dumps({"models": [model]}))
    return path


async def _run(server: servers.Server, times: list[float], runs: asyncio.Event) -> None:
    def note() -> None:
        times.append(time.perf_counter())
        runs.set()

    body = {"model": "bench", "prompt": [1, 2, 3], "max_tokens": 4000, "ignore_eos": True}
    await client.stream(
        server.host,
        server.port,
        "/v1/completions",
        body,
        on_token=note,
    )


def _body(number: int, schema: int) -> dict[str, Any]:
    properties = {
        f"answer_{schema}_{i}": {
            "type": "object",
            "properties": {
                "text": {"type": "string", "pattern": f"^[a-z]{{3,{8 + i % 5}}}$"},
                "kind": {"enum": [f"kind_{schema}_{i}_{j}" for j in range(8)]},
            },
            "required": ["text", "kind"],
        }
        for i in range(FIELDS)
    }
    form = {"type": "object", "properties": properties, "required": list(properties)}
    return {
        "model": "bench",
        "prompt": f"{_COMMON}\nQuestion {number}: what comes first?",
        "max_tokens": 4,
        "temperature": 0,
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": form}},
    }
