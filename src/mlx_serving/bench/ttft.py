"""Where the time to a first token goes, and what each stage's preparation is worth, on and off.

A round is `PROMPTS` requests that arrive together, each a common text of some thousand characters and
a question of its own, held to a JSON schema. Stages are the server's own figures (`/metrics`).
"""

from __future__ import annotations

import asyncio
import re
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_serving.bench import client, servers

PROMPTS = 8
_COMMON = " ".join(f"Rule {i}: answer question {i} before question {i + 1}." for i in range(120))
_STAGE = re.compile(
    r'^mlx_serving_ttft_stage_seconds_(sum|count)\{.*stage="(\w+)".*\} (\S+)$', re.MULTILINE
)
STAGES = ("tokenise", "grammar", "hash", "queue", "disk", "prefill")


@dataclass(slots=True)
class Pipeline:
    """One way of serving. `ttfts_s`: medians of the rounds; `stages_ms`: means over all requests."""

    name: str
    ttfts_s: list[float] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)

    @property
    def ttft_s(self) -> float:
        return statistics.median(self.ttfts_s)

    def stage_ms(self, stage: str) -> float | None:
        """None: no request had it."""
        count = self.counts.get(stage, 0.0)
        return 1e3 * self.sums[stage] / count if count else None


async def measure(folder: Path, rounds: int) -> list[Pipeline]:
    """Everything on, and each preparation off, in turn. All requests of a round come to a server that
    was just started; blocks on disk are those of a server before it."""
    on, no_disk = Pipeline("all on"), Pipeline("prefix not on disk")
    no_prefix, no_schema = Pipeline("no prefix cache"), Pipeline("each schema compiled anew")
    with tempfile.TemporaryDirectory() as blocks:
        disk = ("--kv-disk-path", blocks)
        await _round(Pipeline("before"), folder, disk)
        for _ in range(rounds):
            await _round(on, folder, disk)
            await _round(no_disk, folder, ())
            await _round(no_prefix, folder, ("--prefix-cache-bytes", "0"))
            await _round(no_schema, folder, disk, one_schema=False)
    return [on, no_disk, no_prefix, no_schema]


async def _round(
    pipeline: Pipeline, folder: Path, flags: Sequence[str], *, one_schema: bool = True
) -> None:
    async with servers.serving(folder, *flags) as server:
        asked = [
            client.stream(
                server.host, server.port, "/v1/completions", _body(i, 0 if one_schema else i)
            )
            for i in range(PROMPTS)
        ]
        timings = await asyncio.gather(*asked)
        _, page = await client.get(server.host, server.port, "/metrics")
    pipeline.ttfts_s.append(statistics.median(timing.ttft_s for timing in timings))
    for kind, stage, value in _STAGE.findall(page.decode()):
        into = pipeline.sums if kind == "sum" else pipeline.counts
        into[stage] = into.get(stage, 0.0) + float(value)


def _body(number: int, schema: int) -> dict[str, Any]:
    properties = {f"answer_{schema}_{i}": {"type": "string", "maxLength": 8} for i in range(30)}
    form = {"type": "object", "properties": properties, "required": list(properties)}
    return {
        "model": "bench",
        "prompt": f"{_COMMON}\nQuestion {number}: what comes first?",
        "max_tokens": 4,
        "temperature": 0,
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": form}},
    }
