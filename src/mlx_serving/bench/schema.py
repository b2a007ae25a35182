"""What a JSON schema costs: the same server and load with and without one, in turn; and what is gained
where its forced tokens are computed several at once.

Both ask for as many tokens: without a schema the end of sequence is ignored, with it the schema asks
for more items than there is room for. Every round's schema is one that the server has not compiled.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_serving.bench import client, servers, workloads

FORCED_METRIC = "mlx_serving_forced_tokens_total"


@dataclass(frozen=True, slots=True)
class SchemaCost:
    """Medians over the rounds, ratios taken round by round: with a schema over without."""

    streams: int
    ttft_ms: tuple[float, float]
    """Without and with a schema."""
    tpot_ms: tuple[float, float]
    ttft_ratio: float
    tpot_ratio: float


@dataclass(frozen=True, slots=True)
class Jumps:
    """What `--jump-forward auto` gains over `off`: medians over the rounds, the ratio round by round."""

    streams: int
    tokens_per_s: tuple[float, float]
    """Without and with it, over all streams."""
    ratio: float
    forced_share: float
    """Of the tokens."""


PET: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "species": {"enum": ["cat", "dog", "guinea pig"]},
        "age_in_years": {"type": "integer", "minimum": 0, "maximum": 30},
        "owner": {
            "type": "object",
            "properties": {
                "first_name": {"type": "string", "maxLength": 12},
                "telephone_number": {"type": "string", "pattern": "^[0-9]{3}-[0-9]{4}$"},
            },
            "required": ["first_name", "telephone_number"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "species", "age_in_years", "owner"],
    "additionalProperties": False,
}


def wish(turn: int) -> dict[str, Any]:
    """A list of records that never ends; `turn` makes the schema new."""
    record = {
        "type": "object",
        "properties": {
            f"name_{turn}": {"type": "string", "maxLength": 24},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "kind": {"enum": ["cat", "dog", "bird"]},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 3},
        },
        "required": [f"name_{turn}", "age", "kind", "tags"],
        "additionalProperties": False,
    }
    schema = {"type": "array", "items": record, "minItems": 1000}
    return {
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    }


async def measure(
    folder: Path, *, streams: int = 8, max_tokens: int = 24, rounds: int = 3
) -> SchemaCost:
    plain: list[tuple[float, float]] = []
    bound: list[tuple[float, float]] = []
    async with servers.serving(folder) as server:
        for turn in range(-1, rounds):
            # Who goes first alternates: a machine that slows down disturbs both alike.
            order = [(plain, {"ignore_eos": True}), (bound, wish(turn))]
            for figures, more in order if turn % 2 else reversed(order):
                seed = 2 * turn + (figures is bound)
                told = await _round(server, streams, max_tokens, seed, more)
                if turn >= 0:  # the first round warms up
                    figures.append(told)
    return _summary(streams, plain, bound)


async def jumps(folder: Path, streams: int, rounds: int) -> Jumps:
    """Two servers get the same requests in turn. Raises AssertionError if an answer differs."""
    rates: tuple[list[float], list[float]] = [], []
    async with (
        servers.serving(folder, "--jump-forward", "off") as off,
        servers.serving(folder, "--jump-forward", "auto") as auto,
    ):
        forced = made = 0.0
        for turn in range(-1, rounds):
            answers: dict[int, list[str]] = {}
            for which in (0, 1) if turn % 2 else (1, 0):
                before = await servers.metric(auto, FORCED_METRIC)
                began_s = time.perf_counter()
                timings = await _pets((off, auto)[which], streams, turn)
                tokens = sum(t.completion_tokens for t in timings)
                answers[which] = [t.text for t in timings]
                if turn >= 0:  # the first round warms up
                    rates[which].append(tokens / (time.perf_counter() - began_s))
                    forced += await servers.metric(auto, FORCED_METRIC) - before
                    made += tokens * which
            assert answers[0] == answers[1], "an answer depends on --jump-forward"
    ratio = statistics.median(b / a for a, b in zip(*rates, strict=True))
    medians = statistics.median(rates[0]), statistics.median(rates[1])
    return Jumps(streams, medians, ratio, forced / made)


async def _pets(server: servers.Server, streams: int, turn: int) -> list[client.Timing]:
    bodies = [
        {
            "model": "bench",
            "messages": [{"role": "user", "content": f"Describe pet {8 * turn + i} as JSON."}],
            "structured_outputs": {"json": PET, "disable_any_whitespace": True},
            "temperature": 0.8,
            "seed": 1000 + 100 * turn + i,
            "max_tokens": 160,
        }
        for i in range(streams)
    ]
    path = "/v1/chat/completions"
    return await asyncio.gather(
        *(client.stream(server.host, server.port, path, body) for body in bodies)
    )


async def _round(
    server: servers.Server, streams: int, max_tokens: int, seed: int, more: dict[str, Any]
) -> tuple[float, float]:
    """(TTFT, TPOT), medians over the streams."""
    bodies = workloads.chat_requests(streams, max_tokens, seed=10_000 + seed)
    timings = await asyncio.gather(
        *(
            client.stream(
                server.host,
                server.port,
                "/v1/chat/completions",
                body | more | {"model": "bench", "max_tokens": max_tokens},
            )
            for body in bodies
        )
    )
    assert all(t.completion_tokens == max_tokens for t in timings), "the load must be equal"
    return (
        statistics.median(t.ttft_s for t in timings),
        statistics.median(t.tpot_s for t in timings),
    )


def _summary(
    streams: int, plain: Sequence[tuple[float, float]], bound: Sequence[tuple[float, float]]
) -> SchemaCost:
    def both(i: int) -> tuple[float, float]:
        return tuple(statistics.median(f[i] for f in side) * 1e3 for side in (plain, bound))  # type: ignore[return-value]

    def ratio(i: int) -> float:
        return statistics.median(b[i] / p[i] for p, b in zip(plain, bound, strict=True))

    return SchemaCost(streams, both(0), both(1), ratio(0), ratio(1))
