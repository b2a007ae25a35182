"""Tokens per second of the native kernels in-process: prefill of 512, and decoding of 1, 8 and 16 streams.

    python benchmarks/native_cpu.py MODEL_DIR [--mode exact] [--unfused] [--threads N] [--stock] [--isa NAME ...]

Reports medians and the best of each; on a machine shared with others the best says more about the
kernels, the median about the machine. `--stock` measures mlx-lm as installed in the same process.
`--isa amx --isa avx512` measures both in turn and compares them, round by round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import load
from mlx_lm.models.cache import make_prompt_cache

from mlx_serving.runtime import native
from mlx_serving.runtime.native import _load, ops
from mlx_serving.runtime.native.install import accelerate
from mlx_serving.runtime.native.slab import PLAIN, RowMask

PROMPT = 512
CONTEXT = 80
ROUNDS = 5


class Slab:
    """One layer's slab for rows that stand at one position; fused or layer by layer."""

    codes = PLAIN

    def __init__(self, rows: int, capacity: int, fused: bool) -> None:
        self.shape = rows, capacity
        self.rows = mx.arange(rows, dtype=mx.int32)
        self.offset = mx.zeros((rows,), mx.int32)
        self.fused = fused
        self.slabs: tuple[mx.array, mx.array] | None = None

    def native_view(self) -> tuple[mx.array, mx.array] | None:
        return (self.rows, self.offset) if self.fused else None

    def native_slabs(
        self, kv_heads: int, key_dim: int, value_dim: int, dtype: mx.Dtype
    ) -> tuple[mx.array, mx.array]:
        rows, capacity = self.shape
        if self.slabs is None:
            return (
                mx.zeros((rows, kv_heads, capacity, key_dim), dtype),
                mx.zeros((rows, kv_heads, capacity, value_dim), dtype),
            )
        return self.slabs

    def native_store(self, keys: mx.array, values: mx.array) -> None:
        self.slabs = keys, values

    def make_mask(self, *_args: Any, window_size: int | None = None, **_: Any) -> RowMask:
        return RowMask(self.rows, self.offset, window_size or 0)

    def update_and_fetch(self, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        slabs = self.native_slabs(k.shape[1], k.shape[3], v.shape[3], k.dtype)
        self.slabs = ops.kv_write(*slabs, k, v, self.rows, self.offset)
        return self.slabs


def head(model: Any) -> Callable[[mx.array], mx.array]:
    return getattr(model, "lm_head", None) or model.model.embed_tokens.as_linear


def measure(
    model: Any, ids: list[int], caches: Callable[[int, int], list[Any]], rounds: int
) -> dict[str, list[float]]:
    """Seconds of each measurement."""
    out = head(model)
    seconds: dict[str, list[float]] = {}

    def step(tokens: mx.array, cache: list[Any]) -> mx.array:
        hidden = model.model(tokens, cache)[:, -1:]
        return mx.argmax(out(hidden)[:, -1], -1)[:, None]

    def advance(cache: list[Any], count: int) -> None:
        if isinstance(cache[0], Slab):
            offset = cache[0].offset + count
            for c in cache:
                c.offset = offset

    for _ in range(max(1, rounds // 8)):
        cache = caches(1, PROMPT)
        start = time.perf_counter()
        mx.eval(step(mx.array([ids[:PROMPT]]), cache))
        seconds.setdefault(f"prefill {PROMPT}", []).append(time.perf_counter() - start)
    for rows in (1, 8, 16):
        cache = caches(rows, 256)
        tokens = step(mx.array([ids[:CONTEXT]] * rows), cache)
        advance(cache, CONTEXT)
        mx.eval(tokens)
        for _ in range(rounds):
            start = time.perf_counter()
            tokens = step(tokens, cache)
            advance(cache, 1)
            mx.eval(tokens)
            seconds.setdefault(f"decode {rows}", []).append(time.perf_counter() - start)
    return seconds


def report(name: str, seconds: dict[str, list[float]]) -> None:
    for what, times in seconds.items():
        kind, _, count = what.partition(" ")
        tokens = int(count)
        times = sorted(times)
        median, best = times[len(times) // 2], times[0]
        print(
            f"{name:14} {kind:8} {count:>4}  median {tokens / median:7.0f} tok/s"
            f"  best {tokens / best:7.0f} tok/s  ({median * 1e3:.2f} ms)"
        )


def measure_isas(
    isas: list[str], of_one: Callable[[], dict[str, list[float]]]
) -> dict[str, dict[str, list[float]]]:
    """Seconds by instruction set; if there are several, in rounds of all of them."""
    seconds: dict[str, dict[str, list[float]]] = {isa: {} for isa in isas}
    medians: dict[str, dict[str, list[float]]] = {isa: {} for isa in isas}
    for _ in range(1 if len(isas) == 1 else ROUNDS):
        for isa in isas:
            if not _load.require().force_isa(isa):
                raise SystemExit(f"{isa} is not one of {_load.require().isas()}")
            for what, times in of_one().items():
                seconds[isa].setdefault(what, []).extend(times)
                medians[isa].setdefault(what, []).append(statistics.median(times))
    for isa in isas[1:]:
        for what, times in medians[isas[0]].items():
            ratios = [b / a for a, b in zip(times, medians[isa][what], strict=True)]
            print(f"{isas[0]} against {isa}: {what} {statistics.median(ratios):.2f} times as fast")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--mode", default="exact", choices=["exact", "fast", "f32"])
    parser.add_argument("--kv", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--unfused", action="store_true")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--stock", action="store_true")
    parser.add_argument("--rounds", type=int, default=48)
    parser.add_argument("--isa", action="append", help="of this CPU's; several are compared")
    parser.add_argument("--json", action="store_true", help="tokens per second over all rounds")
    args = parser.parse_args()
    mx.set_default_device(mx.Device(mx.cpu))
    model: nn.Module
    model, tokenizer = load(str(args.model))
    ids = tokenizer.encode("The quick brown fox jumps over the lazy dog. " * 80)[:PROMPT]
    if args.stock:
        report("mlx-lm", measure(model, ids, lambda _rows, _capacity: make_prompt_cache(model), 8))
    if args.threads:
        native.set_threads(args.threads)
    done = accelerate(model, args.mode, fused=not args.unfused, kv_dtype=getattr(mx, args.kv))
    if not args.json:
        print(f"{done.isa}, {native.threads()} threads, {args.mode}, fused: {done.fused or 'no'}")

    def slabs(rows: int, capacity: int) -> list[Any]:
        return [Slab(rows, capacity, not args.unfused) for _ in model.layers]

    isas = args.isa or [native.isa()]
    each = measure_isas(isas, lambda: measure(model, ids, slabs, args.rounds))
    for isa, seconds in each.items():
        if args.json:
            rates = {k: int(k.split()[1]) * len(v) / sum(v) for k, v in seconds.items()}
            print(json.dumps(rates))
        else:
            report(f"{isa} {args.mode}", seconds)


if __name__ == "__main__":
    main()
