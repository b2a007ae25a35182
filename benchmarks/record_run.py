"""Record one run of a served model: what each request cost, for the simulations of rollouts.

    python benchmarks/record_run.py tests/data/recorded_run.json

Requests of mixed lengths arrive at random at a few rates; each row is (requests running at its
arrival, prompt tokens, completion tokens, TTFT in ms, TPOT in ms).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from pathlib import Path

from mlx_serving import Engine

WORDS = [
    "river",
    "stone",
    "window",
    "garden",
    "letter",
    "morning",
    "paper",
    "silver",
    "kitchen",
    "mountain",
    "summer",
    "candle",
]
RATES = (1.0, 3.0, 6.0)
"""Requests a second."""


async def record(model: str, each: int, seed: int) -> list[list[float]]:
    rng = random.Random(seed)
    rows: list[list[float]] = []
    running = 0
    async with Engine(model, prefix_cache_bytes=0) as engine:

        async def one(words: int, max_tokens: int) -> None:
            nonlocal running
            prompt, beside, times = " ".join(rng.choices(WORDS, k=words)), running, []
            prompt_tokens = len(await engine.tokenize(prompt))
            running += 1
            began_s, tokens = time.perf_counter(), 0
            async for chunk in engine.generate(prompt, max_tokens=max_tokens, ignore_eos=True):
                times.append(time.perf_counter() - began_s)
                tokens += len(chunk.token_ids)
            running -= 1
            tpot_ms = 1e3 * (times[-1] - times[0]) / (tokens - 1)
            rows.append(
                [beside, prompt_tokens, tokens, round(1e3 * times[0], 2), round(tpot_ms, 3)]
            )

        await one(8, 8)
        rows.clear()
        for rate in RATES:
            tasks = []
            for _ in range(each):
                task = one(int(2 ** rng.uniform(3, 8)), rng.randint(4, 48))
                tasks.append(asyncio.create_task(task))
                await asyncio.sleep(rng.expovariate(rate))
            await asyncio.gather(*tasks)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--each", type=int, default=120, help="requests at each rate")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rows = asyncio.run(record(args.model, args.each, args.seed))
    columns = ["running", "prompt_tokens", "completion_tokens", "ttft_ms", "tpot_ms"]
    args.file.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join("    " + json.dumps(row) for row in rows)
    args.file.write_text(
        f'{{\n  "columns": {json.dumps(columns)},\n  "rows": [\n{lines}\n  ]\n}}\n'
    )
    print(f"{len(rows)} requests")


main()
