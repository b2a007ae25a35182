"""The doctor's measurements: a short-lived job that imports MLX and prints what it found.

`python -m mlx_serving.runtime.doctor --json` prints one `host.Probe` as JSON. It runs apart from
the command because an unusable MLX may end the process rather than raise.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any, Literal

import msgspec

from mlx_serving.host import Probe
from mlx_serving.runtime import blas

BUDGET_S = 1.0
"""For each of the two measurements, after a warm-up."""


def probe(budget_s: float = BUDGET_S) -> Probe:
    """Import MLX, look at its device and measure it. An MLX that cannot be imported is a result."""
    products = blas.preload()
    try:
        mx: Any = importlib.import_module("mlx.core")
    except ImportError as error:
        return Probe(error=str(error))
    native, native_detail = _native()
    backend = _backend(mx)
    if not native and backend == "cpu":
        native_detail = f"{native_detail}; {products}"
    info: dict[str, Any] = mx.device_info() if hasattr(mx, "device_info") else {}
    return Probe(
        mlx_version=mx.__version__,
        mlx_lm_version=_installed("mlx-lm"),
        backend=backend,
        device=str(info.get("device_name", "")),
        device_memory_bytes=int(info.get("memory_size", 0) or info.get("total_memory", 0)),
        compiler=shutil.which("g++"),
        native=native,
        native_detail=native_detail,
        f32_gflops=_f32_gflops(mx, budget_s),
        q4_gbytes_per_s=_q4_gbytes_per_s(mx, budget_s),
    )


def _backend(mx: Any) -> Literal["cpu", "metal", "cuda"]:
    if mx.default_device() == mx.Device(mx.cpu, 0):
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _native() -> tuple[bool, str]:
    """Whether the native kernels load here, and what they use or why not."""
    try:
        native: Any = importlib.import_module("mlx_serving.runtime.native")
    except ImportError as error:
        return False, str(error)
    describe: Callable[[], tuple[bool, str]] | None = getattr(native, "describe", None)
    return describe() if describe else (False, "not built")


def _f32_gflops(mx: Any, budget_s: float) -> float:
    n = 1024
    a, b = mx.ones((n, n), mx.float32), mx.ones((n, n), mx.float32)
    return 2 * n**3 * _rate(lambda: mx.eval(a @ b), budget_s) / 1e9


def _q4_gbytes_per_s(mx: Any, budget_s: float) -> float:
    rows, columns, group = 4096, 1024, 32
    weights, scales, biases = mx.quantize(mx.ones((rows, columns)), group_size=group, bits=4)
    x = mx.ones((1, columns))

    def product() -> None:
        mx.eval(mx.quantized_matmul(x, weights, scales, biases, group_size=group, bits=4))

    size = weights.nbytes + scales.nbytes + biases.nbytes
    return float(size) * _rate(product, budget_s) / 1e9


def _rate(work: Callable[[], None], budget_s: float) -> float:
    """Calls a second, after one that warms up."""
    work()
    calls, start = 0, time.perf_counter()
    while True:
        work()
        calls += 1
        elapsed = time.perf_counter() - start
        if elapsed >= budget_s:
            return calls / elapsed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mlx_serving.runtime.doctor")
    parser.add_argument("--json", action="store_true", help="print JSON (the only form)")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S)
    args = parser.parse_args(argv)
    sys.stdout.write(msgspec.json.encode(probe(args.budget_s)).decode() + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
