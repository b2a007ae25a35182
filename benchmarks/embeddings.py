"""Embeddings a second: our kernels and stock MLX in turn, and a stream beside a large request.

    python benchmarks/embeddings.py [--rounds 5] [--texts 64]

Texts have 6 to 60 words. Figures are medians over the rounds; a round measures each once, so that
what else the machine does falls on all of them.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import statistics
import time

from mlx_serving import Engine

WORDS = ("the", "capital", "river", "blue", "green", "of", "city", "house", "large", "old", "fire")


def texts(count: int, seed: int = 1) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(6, 60))) for _ in range(count)]


async def rate(engine: Engine, inputs: list[str]) -> tuple[float, float]:
    """Texts and tokens a second."""
    began_s = time.perf_counter()
    found = await engine.embed(inputs)
    took_s = time.perf_counter() - began_s
    return len(inputs) / took_s, found.usage.prompt_tokens / took_s


async def speed(rounds: int, count: int) -> None:
    inputs = texts(count)
    async with (
        Engine("all-minilm-l6-v2") as native,
        Engine("all-minilm-l6-v2", kernels="off") as stock,
    ):
        figures: dict[str, list[tuple[float, float]]] = {"native kernels": [], "stock MLX": []}
        for _ in range(rounds):
            figures["native kernels"].append(await rate(native, inputs))
            figures["stock MLX"].append(await rate(stock, inputs[: max(4, count // 8)]))
    print("| all-MiniLM-L6-v2, f32 | texts/s | tokens/s |\n|---|---|---|")
    for name, pairs in figures.items():
        per_text, per_token = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"| {name} | {per_text:.1f} | {per_token:.0f} |")


async def gaps_ms(engine: Engine) -> list[float]:
    """Between the tokens of one stream."""
    seen_s: list[float] = []
    async for chunk in engine.generate(
        "Once upon a time", model="smollm2-135m", max_tokens=48, temperature=0, ignore_eos=True
    ):
        seen_s += [time.perf_counter()] * bool(chunk.token_ids)
    return [(b - a) * 1e3 for a, b in itertools.pairwise(seen_s)]


async def beside(rounds: int) -> None:
    """A stream alone, and beside a request for many vectors, of either model."""
    inputs = texts(400)
    found: dict[str, list[float]] = {"alone": [], "all-minilm-l6-v2": [], "smollm2-135m": []}
    async with Engine(["smollm2-135m", "all-minilm-l6-v2"]) as engine:
        await gaps_ms(engine)
        for _ in range(rounds):
            for name, gaps in found.items():
                if name == "alone":
                    gaps += await gaps_ms(engine)
                    continue
                large = asyncio.create_task(engine.embed(inputs, model=name))
                await asyncio.sleep(0.2)
                gaps += await gaps_ms(engine)
                large.cancel()
                await asyncio.gather(large, return_exceptions=True)
    print(
        "\n| one stream of SmolLM2 beside vectors of | median gap, ms | longest, ms |\n|---|---|---|"
    )
    for name, gaps in found.items():
        print(f"| {name} | {statistics.median(gaps):.0f} | {max(gaps):.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--texts", type=int, default=64)
    args = parser.parse_args()
    asyncio.run(speed(args.rounds, args.texts))
    asyncio.run(beside(max(1, args.rounds // 2)))


if __name__ == "__main__":
    main()
