"""What KV in fewer bits costs on the native CPU kernels: a decode step, and a chunk of a prompt, after
contexts of several lengths, beside KV as computed.

    python benchmarks/quantized_kv.py MODEL_DIR [--rounds 7] [--contexts 250 1000 4000] [--rows 1 8]

Every round measures every form once, one after another; ratios are within a round. CPU time is that of
all threads; the wall's is worth reading on a quiet machine only. About a minute.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
from mlx_lm import load

from mlx_serving.runtime import native
from mlx_serving.runtime.backend.in_place import QuantizedInPlaceLayer
from mlx_serving.runtime.backend.kv import KVLayer, RowSlots
from mlx_serving.runtime.backend.quantized_kv import FORMATS
from mlx_serving.runtime.native.install import accelerate

CHUNK = 128
STEPS = 3


def store_of(model: Any, form: Any, rows: int, context: int) -> RowSlots:
    """Rows that hold `context` positions, all zero: what they hold does not change the work."""
    layer: Any = KVLayer if form is None else partial(QuantizedInPlaceLayer, form=form)
    store = RowSlots(model, rows, bucket=256, attention=layer)
    for row in range(rows):
        store.start(row, context + CHUNK)
        store.rows.lengths[row] = context
    return store


def decode(model: Any, store: RowSlots, rows: int, context: int) -> mx.array:
    cache = store.batch_view(dict.fromkeys(range(rows), context), rows)
    return model(mx.array([[5]] * rows), cache=cache)


def prefill(model: Any, store: RowSlots, _rows: int, context: int) -> mx.array:
    return model.model(mx.array([[5] * CHUNK]), cache=store.row_view(0, context, CHUNK))


def timed(step: Callable[..., mx.array], model: Any, store: RowSlots, *where: int) -> list[float]:
    """CPU and wall seconds of a step."""
    rows, context = where
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(STEPS):
        mx.eval(step(model, store, rows, context))
        for row in range(rows):
            store.rows.lengths[row] = context
    return [(time.process_time() - cpu) / STEPS, (time.perf_counter() - wall) / STEPS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--contexts", type=int, nargs="*", default=[250, 1000, 4000])
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8])
    args = parser.parse_args()
    mx.set_default_device(mx.Device(mx.cpu))
    model: Any = load(args.model)[0]
    report = accelerate(model)
    print(f"{native.isa()}, {native.threads()} threads, {report.fused}; ms: CPU, wall, CPU by off")
    what = [("decode", decode, rows) for rows in args.rows] + [("prefill", prefill, 1)]
    for context in args.contexts:
        for name, step, rows in what:
            stores = {b: store_of(model, form, rows, context) for b, form in FORMATS.items()}
            for store in stores.values():
                timed(step, model, store, rows, context)
            rounds = [
                {b: timed(step, model, store, rows, context) for b, store in stores.items()}
                for _ in range(args.rounds)
            ]
            for bits in stores:
                cpu, wall = (statistics.median(r[bits][i] * 1e3 for r in rounds) for i in (0, 1))
                ratio = statistics.median(r[bits][0] / r["off"][0] for r in rounds)
                title = f"{name} {rows} rows" if step is decode else f"{name} {CHUNK}"
                print(f"{context:6} {title:14} {bits:5} {cpu:8.2f} {wall:8.2f} {ratio:6.2f}")


if __name__ == "__main__":
    main()
