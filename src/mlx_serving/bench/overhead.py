"""What the gateway costs without a model's compute: a scripted model, real processes, real TCP.

Measured: p50 of a non-streamed request, tokens per gateway CPU second over 16 streams, time from
`serve` to the first answer of /health, and the idle gateway's memory.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from mlx_serving.bench import client, servers

SCRIPTED = {
    "model_type": "scripted",
    "vocab_size": 49152,
    "max_position_embeddings": 1_000_000,
    "eos_token_id": 2,
}
"""config.json of a model without arithmetic; the tokenizer is copied from a real one."""


def _script(tokenizer_from: Path) -> dict[str, object]:
    """Whole words, so that every token is text."""
    vocab = json.loads((tokenizer_from / "tokenizer.json").read_text())["model"]["vocab"]
    words = sorted(i for piece, i in vocab.items() if piece.isascii() and piece.isalpha())
    return {"mode": "cycle", "token_ids": words[100:700]}


@dataclass(frozen=True, slots=True)
class Overhead:
    request_p50_ms: float
    request_p95_ms: float
    stream_tokens_per_cpu_s: float
    stream_tokens_per_s: float
    health_s: float
    idle_rss_mb: float


def scripted_folder(parent: Path, tokenizer_from: Path, script: dict[str, object]) -> Path:
    """A model folder whose tokens come from a script (see `runtime.backend.scripted`)."""
    folder = parent / "scripted"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**SCRIPTED, "script": script}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tokenizer_from / name).read_bytes())
    return folder


async def measure(
    tokenizer_from: Path, *, requests: int = 300, tokens: int = 1500, rounds: int = 5
) -> Overhead:
    with tempfile.TemporaryDirectory() as tmp:
        at_once = _script(tokenizer_from)
        # Paced, so that few rows are merged on their way: an event a token.
        paced = {**at_once, "step_delay_ms": 2.0}
        port = servers.free_port()

        def command(script: dict[str, object]) -> list[str]:
            folder = scripted_folder(Path(tmp), tokenizer_from, script)
            return servers.ours(str(folder), "--port", str(port))

        starts = []
        for _ in range(rounds):
            async with servers.running("ours", command(at_once), port=port) as server:
                starts.append(server.answered_s)
        async with servers.running("ours", command(at_once), port=port, ready="/ready") as server:
            await asyncio.sleep(1.0)
            rss_mb = server.rss_bytes() / 1e6
            latencies_ms = await _requests(server, requests)
        async with servers.running("ours", command(paced), port=port, ready="/ready") as server:
            rates = [await _streams(server, tokens) for _ in range(rounds)]
        return Overhead(
            request_p50_ms=statistics.median(latencies_ms),
            request_p95_ms=statistics.quantiles(latencies_ms, n=20)[-1],
            stream_tokens_per_cpu_s=statistics.median(cpu for cpu, _ in rates),
            stream_tokens_per_s=statistics.median(wall for _, wall in rates),
            health_s=statistics.median(starts),
            idle_rss_mb=rss_mb,
        )


async def _requests(server: servers.Server, count: int) -> list[float]:
    """Milliseconds of each of `count` one-token requests, one after the other, over one connection."""
    body = json.dumps(
        {"messages": [{"role": "user", "content": "Hello there."}], "max_tokens": 1}
    ).encode()
    reader, writer = await asyncio.open_connection(server.host, server.port)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: {server.host}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    ).encode()
    latencies_ms = []
    for i in range(count + 20):
        began_s = time.perf_counter()
        writer.write(head + body)
        status = int((await reader.readline()).split()[1])
        length = 0
        while line := (await reader.readline()).strip():
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        answer = await reader.readexactly(length)
        assert status == 200, answer
        if i >= 20:
            latencies_ms.append((time.perf_counter() - began_s) * 1e3)
    writer.close()
    return latencies_ms


async def _streams(server: servers.Server, tokens: int, streams: int = 16) -> tuple[float, float]:
    """(events per CPU second of the gateway process, events per wall second), an event a token."""
    bodies = [
        {
            "messages": [{"role": "user", "content": f"Stream {i}."}],
            "max_tokens": tokens,
            "ignore_eos": True,
        }
        for i in range(streams)
    ]
    cpu_s, wall_s = server.cpu_s(), time.perf_counter()
    timings = await asyncio.gather(
        *(client.stream(server.host, server.port, "/v1/chat/completions", b) for b in bodies)
    )
    cpu_s, wall_s = server.cpu_s() - cpu_s, time.perf_counter() - wall_s
    total = sum(t.completion_tokens for t in timings)
    events = sum(len(t.token_times_s) for t in timings)
    assert total == streams * tokens, (total, streams, tokens)
    # Rows merge on their way when the gateway falls behind: events are what is counted, not tokens.
    return min(events, total) / cpu_s, min(events, total) / wall_s
