"""Latent attention (MLA) read in place beside the way that copies: a decode step, and a chunk of a prompt,
after contexts of several lengths.

    python benchmarks/latent_attention.py [--rounds 7] [--contexts 250 1000 4000] [--rows 1 8] [--layers 4]

Layers of deepseek_v3 with 16 heads over a latent of 512 and 64, random weights in 4 bits, no experts;
all products are the kernels' on both sides. Every round measures both ways, in turn; ratios are within a
round. CPU time is that of all threads; the wall's is worth reading on a quiet machine only.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import deepseek_v3

from mlx_serving.runtime import native
from mlx_serving.runtime.backend.in_place import InPlaceLayer
from mlx_serving.runtime.backend.kv import KVLayer, RowSlots
from mlx_serving.runtime.native.install import accelerate

CHUNK = 128
CONFIG = {
    "vocab_size": 1024,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "n_routed_experts": None,
}
WAYS = {"in place": InPlaceLayer, "copying": KVLayer}


def model_of(layers: int) -> Any:
    args = deepseek_v3.ModelArgs(**CONFIG, num_hidden_layers=layers)
    model = deepseek_v3.Model(args)
    nn.quantize(model, 64, 4)
    mx.eval(model.parameters())
    return model


def timed(model: Any, store: RowSlots, rows: int, context: int, chunk: int) -> tuple[float, float]:
    """CPU and wall seconds of a step, or of a prompt's chunk. What rows hold does not change the work."""
    for row in range(rows):
        store.rows.lengths[row] = context
    if chunk:
        tokens, cache = [[5] * chunk], store.row_view(0, context, chunk)
    else:
        tokens, cache = [[5]] * rows, store.batch_view(dict.fromkeys(range(rows), context), rows)
    cpu, wall = time.process_time(), time.perf_counter()
    mx.eval(model.model(mx.array(tokens), cache=cache))
    return time.process_time() - cpu, time.perf_counter() - wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--contexts", type=int, nargs="*", default=[250, 1000, 4000])
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()
    mx.set_default_device(mx.Device(mx.cpu))
    model = model_of(args.layers)
    accelerate(model)
    print(f"{native.isa()}, {native.threads()} threads; ms: CPU, wall, CPU by copying, wall by it")
    for context in args.contexts:
        for rows, chunk in [*((rows, 0) for rows in args.rows), (1, CHUNK)]:
            stores = {way: RowSlots(model, rows, attention=layer) for way, layer in WAYS.items()}
            for store in stores.values():
                for row in range(rows):
                    store.start(row, context + CHUNK)
                timed(model, store, rows, context, chunk)
            rounds = [
                {way: timed(model, store, rows, context, chunk) for way, store in stores.items()}
                for _ in range(args.rounds)
            ]
            title = f"prefill {chunk}" if chunk else f"decode {rows} rows"
            for way in WAYS:
                figures = [statistics.median(r[way][i] * 1e3 for r in rounds) for i in (0, 1)]
                figures += [
                    statistics.median(r[way][i] / r["copying"][i] for r in rounds) for i in (0, 1)
                ]
                print(f"{context:6} {title:14} {way:9} " + " ".join(f"{x:8.2f}" for x in figures))


if __name__ == "__main__":
    main()
