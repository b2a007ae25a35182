"""What adapters cost: streams of SmolLM2 itself and of adapters beside it, in turn.

    python benchmarks/adapters.py [--rounds 5] [--streams 8] [--tokens 48]

The adapters are what `mlx_lm.lora` writes by default (rank 8, every linear layer of the last 16
blocks), with random numbers. Figures are medians over the rounds, and medians of the ratios to the
same round's base; a round measures each once. About three minutes on two cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model

from mlx_serving import Engine
from mlx_serving.catalog.ensure import ensure
from mlx_serving.config import Config

MODEL, PARAMETERS, LAYERS = "smollm2-135m", {"rank": 8, "scale": 20.0, "dropout": 0.0}, 16
PROMPT_TOKENS = 512


def write(folder: Path, base: Path, seed: int) -> str:
    model, _ = load_model(base, lazy=True)
    model.freeze()
    linear_to_lora_layers(model, LAYERS, PARAMETERS)
    mx.random.seed(seed)
    weights = {
        k: 0.01 * mx.random.normal(v.shape) for k, v in tree_flatten(model.trainable_parameters())
    }
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    config = {"fine_tune_type": "lora", "num_layers": LAYERS, "lora_parameters": PARAMETERS}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return f"{folder.name}={folder}"


async def decoding(engine: Engine, names: list[str], tokens: int) -> float:
    """Tokens a second, one stream a name."""
    told = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    began_s = time.perf_counter()
    await asyncio.gather(*(engine.complete([1], model=name, **told) for name in names))
    return len(names) * tokens / (time.perf_counter() - began_s)


async def prefill(engine: Engine, name: str, salt: str) -> float:
    """Tokens of a prompt a second."""
    prompt = [1 + 7 * i % 1000 for i in range(PROMPT_TOKENS)]
    began_s = time.perf_counter()
    await engine.complete(prompt, model=name, max_tokens=1, temperature=0, cache_salt=salt)
    return PROMPT_TOKENS / (time.perf_counter() - began_s)


async def measure(rounds: int, streams: int, tokens: int, folder: Path) -> None:
    base = ensure(MODEL, Config()).path
    adapters = [write(folder / f"a{i}", base, i) for i in range(streams)]
    ours = [f"{MODEL}+a{i}" for i in range(streams)]
    loads: dict[str, list[str]] = {
        "the model itself": [MODEL] * streams,
        "one adapter": ours[:1] * streams,
        "an adapter each": ours,
        "half of them the model's, an adapter each for the rest": [MODEL] * (streams // 2)
        + ours[: streams - streams // 2],
        "one stream of the model": [MODEL],
        "one stream of an adapter": ours[:1],
    }
    async with Engine(MODEL, adapter=adapters, max_num_seqs=streams) as engine:
        began_s = time.perf_counter()
        await engine.gateway.unload(ours[0])
        await engine.gateway.load(ours[0])
        print(f"unloaded and loaded again in {1e3 * (time.perf_counter() - began_s):.0f} ms\n")
        await decoding(engine, [MODEL, *ours], 4)
        found: dict[str, list[float]] = {name: [] for name in loads}
        prompts: dict[str, list[float]] = {MODEL: [], ours[0]: []}
        for turn in range(rounds):
            for load, names in loads.items():
                found[load].append(await decoding(engine, names, tokens))
            for name, rates in prompts.items():
                rates.append(await prefill(engine, name, f"{turn}"))
    print(f"| {streams} streams, decoding | tokens/s | of the model's |\n|---|---|---|")
    for load, rates in found.items():
        against = found["one stream of the model" if "stream" in load else "the model itself"]
        _row(load, rates, against)
    for name, rates in prompts.items():
        what = "the model" if name == MODEL else "an adapter"
        _row(f"prefill of {PROMPT_TOKENS} by {what}", rates, prompts[MODEL])


def _row(what: str, rates: list[float], against: list[float]) -> None:
    ratio = statistics.median(a / b for a, b in zip(rates, against, strict=True))
    print(f"| {what} | {statistics.median(rates):.0f} | {ratio:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(measure(args.rounds, args.streams, args.tokens, Path(folder)))


if __name__ == "__main__":
    main()
