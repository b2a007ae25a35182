"""What the prefix cache saves: time to the first token, prefill work, and a replay of conversations.

The replay is the same for every server: chats that share a system prompt, turn by turn, each turn
with the server's own answers before it.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_serving.bench import client, servers, workloads
from mlx_serving.bench.compare import Rival
from mlx_serving.bench.workloads import token_ids

SHARED_TOKENS = 2000
TAIL_TOKENS = 8
ARRIVALS = 16
IN_FLIGHT = 4
"""Requests of a replay that run at once."""


@dataclass(frozen=True, slots=True)
class Reuse:
    """Times to the first token behind a shared prefix, and the prefill of arrivals together."""

    cold_s: float
    memory_s: float
    disk_s: float
    memory_ratio: float
    """Cold over warm; medians of the ratios, round by round."""
    disk_ratio: float
    work_ratio: float
    """Tokens prefilled for the arrivals, over one prompt and the other tails."""


@dataclass(frozen=True, slots=True)
class Replay:
    rival: str
    chats: int
    turns: int
    ours_s: float
    """To the last answer."""
    theirs_s: float


async def _ttft_s(server: servers.Server, prompt: Sequence[int]) -> float:
    body = {"model": "bench", "prompt": list(prompt), "max_tokens": 2, "temperature": 0}
    body |= {"ignore_eos": True}
    timing = await client.stream(server.host, server.port, "/v1/completions", body)
    return timing.ttft_s or timing.end_s


async def reuse(folder: Path, *, rounds: int = 3) -> Reuse:
    """Each round: a prefix nobody knows, again from memory, and from disk after a restart."""
    times: list[tuple[float, float, float]] = []
    with tempfile.TemporaryDirectory(prefix="bench-kv-") as kv:
        for turn in range(rounds):
            rng = random.Random(turn)
            shared = token_ids(rng, SHARED_TOKENS)
            async with servers.serving(folder, "--kv-disk-path", kv) as server:
                await _ttft_s(server, token_ids(rng, 16))
                cold_s = await _ttft_s(server, shared + token_ids(rng, TAIL_TOKENS))
                warm_s = await _ttft_s(server, shared + token_ids(rng, TAIL_TOKENS))
                await _written(server)
            async with servers.serving(folder, "--kv-disk-path", kv) as server:
                await _ttft_s(server, token_ids(rng, 16))
                disk_s = await _ttft_s(server, shared + token_ids(rng, TAIL_TOKENS))
            times.append((cold_s, warm_s, disk_s))
        async with servers.serving(folder, "--kv-disk-path", kv) as server:
            work = await _arrivals(server)
    cold, memory, disk = (statistics.median(column) for column in zip(*times, strict=True))
    return Reuse(
        cold,
        memory,
        disk,
        statistics.median(c / m for c, m, _ in times),
        statistics.median(c / d for c, _, d in times),
        work,
    )


async def _arrivals(server: servers.Server) -> float:
    rng = random.Random(99)
    shared = token_ids(rng, SHARED_TOKENS)
    before = await servers.metric(server, "mlx_serving_prefill_tokens_total")
    prompts = [shared + token_ids(rng, TAIL_TOKENS) for _ in range(ARRIVALS)]
    await asyncio.gather(*(_ttft_s(server, prompt) for prompt in prompts))
    computed = await servers.metric(server, "mlx_serving_prefill_tokens_total") - before
    return computed / (SHARED_TOKENS + ARRIVALS * TAIL_TOKENS)


async def _written(server: servers.Server) -> None:
    """Until the disk holds what memory does, or for ten seconds."""
    for _ in range(100):
        held = await servers.metric(server, "mlx_serving_prefix_cache_blocks", 'tier="memory"')
        kept = await servers.metric(server, "mlx_serving_prefix_cache_blocks", 'tier="disk"')
        if held and kept >= held:
            return
        await asyncio.sleep(0.1)


async def replay(folder: Path, rival: Rival, *, chats: int, turns: int) -> Replay:
    """Ours, then the rival."""
    async with servers.serving(folder) as server:
        ours_s = await _talk_s(server, "bench", chats, turns)
    async with rival.running() as server:
        theirs_s = await _talk_s(server, rival.model, chats, turns)
    return Replay(rival.name, chats, turns, ours_s, theirs_s)


async def _talk_s(server: servers.Server, model: str, chats: int, turns: int) -> float:
    """Turn by turn through all chats, so that each comes back after the others."""
    system = " ".join(
        body["messages"][0]["content"] for body in workloads.chat_requests(8, 1, seed=3)
    )
    talks: list[list[dict[str, str]]] = [
        [{"role": "system", "content": system}] for _ in range(chats)
    ]
    slots = asyncio.Semaphore(IN_FLIGHT)

    async def say(talk: list[dict[str, str]], text: str) -> None:
        async with slots:
            talk.append({"role": "user", "content": text})
            body: dict[str, Any] = {
                "model": model,
                "messages": talk,
                "max_tokens": 8,
                "temperature": 0,
            }
            timing = await client.stream(server.host, server.port, "/v1/chat/completions", body)
            talk.append({"role": "assistant", "content": timing.text})

    began_s = time.perf_counter()
    for turn in range(turns):
        bodies = workloads.chat_requests(chats, 8, seed=1000 + turn)
        texts = [body["messages"][0]["content"] for body in bodies]
        await asyncio.gather(*(say(talk, text) for talk, text in zip(talks, texts, strict=True)))
    return time.perf_counter() - began_s
