"""The same load against our server, `mlx_lm.server` and bare `stream_generate`, on the same weights.

The servers take turns, round by round, so that a noisy machine disturbs them alike; what is
reported is each figure's median and the median of the ratios, pair by pair.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_serving.bench import client, servers, workloads


@dataclass(frozen=True, slots=True)
class Load:
    """One server's figures for one round at one number of streams."""

    streams: int
    ttft_s: float
    """Median over the streams."""
    tpot_s: float
    tokens_per_s: float
    """All generated tokens over the time from the first request to the last token."""


@dataclass(frozen=True, slots=True)
class Comparison:
    streams: int
    ours: Load
    theirs: Load
    throughput_ratio: float
    ttft_ratio: float
    """Theirs over ours: above 1, ours answers sooner."""
    tpot_ratio: float


@dataclass(frozen=True, slots=True)
class Rival:
    """Another server that speaks OpenAI's API."""

    name: str
    command: Callable[[int], list[str]]
    """For a port."""
    model: str
    """What its requests name."""

    def running(self) -> contextlib.AbstractAsyncContextManager[servers.Server]:
        port = servers.free_port()
        return servers.running(self.name, self.command(port), port=port)


def mlx_lm_server(folder: Path) -> Rival:
    command = [sys.executable, "-m", "mlx_lm.server", "--model", str(folder)]
    return Rival(
        "mlx_lm.server",
        lambda port: [*command, "--port", str(port), "--log-level", "ERROR"],
        "default_model",
    )


def llama_server(programs: Path, gguf: Path, slots: int, slot_tokens: int = 1024) -> Rival:
    """`programs`: the folder of llama.cpp's binaries."""
    threads = len(os.sched_getaffinity(0))
    command = [str(programs / "llama-server"), "-m", str(gguf), "-np", str(slots)]
    command += ["-c", str(slot_tokens * slots), "-t", str(threads), "-tb", str(threads)]
    return Rival("llama-server", lambda port: [*command, "--port", str(port)], "any")


_CAST = """
import sys
from pathlib import Path
import mlx.core as mx
source, target = Path(sys.argv[1]), Path(sys.argv[2])
for file in source.glob("*.safetensors"):
    arrays, meta = mx.load(str(file), return_metadata=True)
    floats = {k: v.astype(mx.float32) if mx.issubdtype(v.dtype, mx.floating) else v
              for k, v in arrays.items()}
    mx.save_safetensors(str(target / file.name), floats, meta)
for file in source.glob("*.json"):
    (target / file.name).write_bytes(file.read_bytes())
"""


def comparable(folder: Path) -> Path:
    """The model with its float parameters in f32, beside the original, made once: on a CPU MLX's
    f16 kernels are many times slower, and a rival must not lose by the file's format."""
    target = folder.with_name(folder.name + "-f32")
    if not (target / "config.json").exists():
        target.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-c", _CAST, str(folder), str(target)], check=True)
    return target


async def run_load(
    server: servers.Server, streams: int, max_tokens: int, model: str, turn: int = 0
) -> Load:
    """`turn` makes the prompts new: servers keep what they have computed."""
    bodies = workloads.chat_requests(streams, max_tokens, seed=100 * streams + turn)
    began_s = time.perf_counter()
    timings = await asyncio.gather(
        *(
            client.stream(server.host, server.port, "/v1/chat/completions", {"model": model, **b})
            for b in bodies
        )
    )
    wall_s = time.perf_counter() - began_s
    return Load(
        streams=streams,
        ttft_s=statistics.median(t.ttft_s for t in timings),
        tpot_s=statistics.median(t.tpot_s for t in timings),
        tokens_per_s=sum(t.completion_tokens for t in timings) / wall_s,
    )


async def compare(
    folder: Path,
    *,
    streams: Sequence[int] = (1, 4, 16),
    max_tokens: int = 24,
    rounds: int = 3,
    extra: Sequence[str] = (),
    rival: Rival | None = None,
) -> list[Comparison]:
    """Ours and a rival (`mlx_lm.server`) in turn, each alone on the machine while it is measured."""
    rival = rival or mlx_lm_server(folder)
    rows: dict[int, list[tuple[Load, Load]]] = {n: [] for n in streams}
    async with servers.serving(folder, *extra) as our_server, rival.running() as their_server:
        # Idle servers use no CPU (ours) or next to none (theirs): both may stay up.
        await run_load(our_server, 1, 4, "bench")
        await run_load(their_server, 1, 4, rival.model)
        for turn in range(1, rounds + 1):
            for n in streams:
                a = await run_load(our_server, n, max_tokens, "bench", turn)
                b = await run_load(their_server, n, max_tokens, rival.model, turn)
                rows[n].append((a, b))
    return [_summary(n, pairs) for n, pairs in rows.items()]


def _summary(streams: int, pairs: Sequence[tuple[Load, Load]]) -> Comparison:
    median = statistics.median

    def load(which: int) -> Load:
        return Load(
            streams,
            median(pair[which].ttft_s for pair in pairs),
            median(pair[which].tpot_s for pair in pairs),
            median(pair[which].tokens_per_s for pair in pairs),
        )

    return Comparison(
        streams,
        load(0),
        load(1),
        throughput_ratio=median(a.tokens_per_s / b.tokens_per_s for a, b in pairs),
        ttft_ratio=median(b.ttft_s / a.ttft_s for a, b in pairs),
        tpot_ratio=median(b.tpot_s / a.tpot_s for a, b in pairs if a.tpot_s),
    )


async def depths(
    folder: Path, *, streams: Sequence[int] = (1, 4, 16), max_tokens: int = 64, rounds: int = 3
) -> dict[int, dict[int, float]]:
    """Median tokens/s by number of streams, then by pipeline depth; a server a depth, in turn."""
    rates: dict[int, dict[int, list[float]]] = {n: {1: [], 2: [], 3: []} for n in streams}
    async with contextlib.AsyncExitStack() as stack:
        running = {}
        for depth in (1, 2, 3):
            flags = ("--pipeline-depth", str(depth), "--prefix-cache-bytes", "0")
            running[depth] = await stack.enter_async_context(servers.serving(folder, *flags))
            await run_load(running[depth], 1, 4, "bench")
        for _ in range(rounds):
            for n in streams:
                for depth, server in running.items():
                    load = await run_load(server, n, max_tokens, "bench")
                    rates[n][depth].append(load.tokens_per_s)
    return {n: {d: statistics.median(r) for d, r in by.items()} for n, by in rates.items()}


_BARE = """
import sys, time
from mlx_lm import load, stream_generate
model, tokenizer = load(sys.argv[1])
messages = [{"role": "user", "content": sys.argv[2]}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
for _ in stream_generate(model, tokenizer, prompt, max_tokens=4): pass
for _ in range(int(sys.argv[4])):
    began, n = time.perf_counter(), 0
    for _ in stream_generate(model, tokenizer, prompt, max_tokens=int(sys.argv[3])): n += 1
    print(n / (time.perf_counter() - began), flush=True)
    sys.stdin.readline()
"""


async def against_bare(
    folder: Path, *, max_tokens: int = 48, rounds: int = 5, extra: Sequence[str] = ()
) -> tuple[float, float, float]:
    """(ours through HTTP, bare stream_generate, median ratio) in tokens/s for one stream, prompt
    included, measured in turn."""
    body = workloads.chat_requests(1, max_tokens, seed=7)[0]
    text = body["messages"][0]["content"]
    # The prompt comes again each round, and stream_generate keeps nothing.
    flags = (*extra, "--prefix-cache-bytes", "0")
    bare = await asyncio.to_thread(
        lambda: subprocess.Popen(
            [sys.executable, "-c", _BARE, str(folder), text, str(max_tokens), str(rounds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    )
    assert bare.stdin is not None
    assert bare.stdout is not None
    pairs: list[tuple[float, float]] = []
    try:
        async with servers.serving(folder, *flags) as server:
            await run_load(server, 1, 4, "bench")
            for _ in range(rounds):
                theirs = float(await asyncio.to_thread(bare.stdout.readline))
                began_s = time.perf_counter()
                timing = await client.stream(server.host, server.port, "/v1/chat/completions", body)
                mine = timing.completion_tokens / (time.perf_counter() - began_s)
                pairs.append((mine, theirs))
                bare.stdin.write("\n")
                bare.stdin.flush()
    finally:
        bare.kill()
        bare.wait()
    median = statistics.median
    return median(p[0] for p in pairs), median(p[1] for p in pairs), median(a / b for a, b in pairs)
