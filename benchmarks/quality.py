"""How far each mode of the native kernels, and each form of quantised KV, is from f32 on the same weights.

Teacher-forced over prose that every Python carries (pydoc's topics): mean KL divergence from the
f32 logits, and how often the most likely token is the same. The f32 mode stands in for mlx-lm's own
f32 forward, which is a hundred times slower on a CPU; the first tokens compare the two.

    python benchmarks/quality.py MODEL_DIR [--tokens 4000] [--modes exact fast]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm import load

from mlx_serving.runtime.backend.in_place import QuantizedInPlaceLayer
from mlx_serving.runtime.backend.kv import RowSlots
from mlx_serving.runtime.backend.quantized_kv import FORMATS
from mlx_serving.runtime.native.install import accelerate
from mlx_serving.runtime.native.slab import PLAIN
from mlx_serving.types import KVBits

WINDOW = 512
CHECK_TOKENS = 48
MAX_KL, MIN_TOP1 = 1e-3, 0.99


class Rows:
    """The least cache that the fused decoder takes: one row, from position 0."""

    codes = PLAIN

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.rows = self.offsets = mx.zeros((1,), mx.int32)

    def native_view(self) -> tuple[mx.array, mx.array]:
        return self.rows, self.offsets

    def native_slabs(
        self, kv_heads: int, key_dim: int, value_dim: int, dtype: mx.Dtype
    ) -> tuple[mx.array, mx.array]:
        shape = (1, kv_heads, self.capacity)
        return mx.zeros((*shape, key_dim), dtype), mx.zeros((*shape, value_dim), dtype)

    def native_store(self, keys: mx.array, values: mx.array) -> None:
        pass


def prose(tokenizer: Any, count: int) -> list[int]:
    text = "\n\n".join(topics[name] for name in sorted(topics))
    return list(tokenizer.encode(text[: count * 12]))[:count]


def logits(model: nn.Module, tokens: list[int]) -> np.ndarray:
    caches = [Rows(len(tokens)) for _ in model.layers]
    out = model(mx.array([tokens]), cache=caches)
    return np.array(out[0].astype(mx.float32))


def quantised_kv_logits(model: nn.Module, bits: KVBits, tokens: list[int]) -> np.ndarray:
    form = FORMATS[bits]
    assert form is not None
    layer = partial(QuantizedInPlaceLayer, form=form)
    store = RowSlots(model, 1, attention=layer)
    store.start(0, len(tokens))
    out = model(mx.array([tokens]), cache=store.row_view(0, 0, len(tokens)))
    return np.array(out[0].astype(mx.float32))


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def compare(reference: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per position: KL(reference ‖ other) in nats, and whether the top token is the same."""
    p, q = log_softmax(reference), log_softmax(other)
    return (np.exp(p) * (p - q)).sum(-1), p.argmax(-1) == q.argmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--modes", nargs="+", default=["exact", "fast"])
    parser.add_argument("--kv-bits", nargs="*", default=[], choices=["16", "8", "4", "k8v4"])
    parser.add_argument("--kv", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument(
        "--require", nargs="*", default=[], help="modes that must be as good as f32"
    )
    args = parser.parse_args()
    mx.set_default_device(mx.Device(mx.cpu))

    stock, tokenizer = load(str(args.model))
    ids = prose(tokenizer, args.tokens)
    stock.set_dtype(mx.float32)
    first = ids[:CHECK_TOKENS]
    plain = np.array(stock(mx.array([first]))[0])

    models: dict[str, nn.Module] = {}
    for mode in ["f32", *args.modes]:
        models[mode], _ = load(str(args.model))
        models[mode].set_dtype(mx.float32)
        kv_dtype = mx.float32 if mode == "f32" else getattr(mx, args.kv)
        accelerate(models[mode], mode, kv_dtype=kv_dtype)
    kl, same = compare(plain, logits(models["f32"], first))
    print(
        f"f32 mode against mlx-lm, {len(first)} tokens: KL {kl.mean():.1e}, top-1 {same.mean():.2%}"
    )

    def candidates(window: list[int]) -> Iterator[tuple[str, str, np.ndarray]]:
        """Mode, form of KV, logits."""
        for mode in args.modes:
            yield mode, args.kv, logits(models[mode], window)
        for bits in args.kv_bits:
            yield "f32", bits, quantised_kv_logits(models["f32"], bits, window)

    found: dict[tuple[str, str], list[tuple[np.ndarray, np.ndarray]]] = {}
    for start in range(0, len(ids), WINDOW):
        window = ids[start : start + WINDOW]
        reference = logits(models["f32"], window)
        for mode, kv, other in candidates(window):
            found.setdefault((mode, kv), []).append(compare(reference, other))
    for (mode, kv), parts in found.items():
        kl, same = (np.concatenate(column) for column in zip(*parts, strict=True))
        if mode in args.require and (kl.mean() > MAX_KL or same.mean() < MIN_TOP1):
            raise SystemExit(
                f"{mode}: mean KL {kl.mean():.1e}, top-1 {same.mean():.2%}: not enough"
            )
        print(
            json.dumps(
                {
                    "mode": mode,
                    "kv": kv,
                    "tokens": len(kl),
                    "mean_kl": float(kl.mean()),
                    "p99_kl": float(np.quantile(kl, 0.99)),
                    "max_kl": float(kl.max()),
                    "top1": float(same.mean()),
                }
            )
        )


if __name__ == "__main__":
    main()
