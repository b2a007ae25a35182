"""How much memory the device has for models. No MLX at import."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from typing import Any

from mlx_serving import host
from mlx_serving.worker.wire import Memory

STEP_SHARE = 0.05
"""Of the budget: for activations, masks, a layer's slab while it grows, a row while it moves."""
STEP_MIN_BYTES = 32 << 20


def device_memory_bytes(info: Mapping[str, Any]) -> int | None:
    """Of a GPU, from `mx.device_info()`; None where it says nothing of memory (the CPU)."""
    for key in ("max_recommended_working_set_size", "memory_size", "total_memory"):
        value = info.get(key)
        if isinstance(value, int) and value > 0:
            return value
    return None


def budget_bytes(given: float | None, info: Mapping[str, Any], gpu: bool) -> int:
    """What all models together may take: weights, KV and prefixes. `given`: `Config.memory_budget`."""
    device = device_memory_bytes(info) if gpu else None
    return host.memory_budget_bytes(given, host.look(), device)


class MLXMemory:
    """What MLX's allocator and the process hold. Implements `model.Device`."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes

    @property
    def usable_bytes(self) -> int:
        return self.budget_bytes - max(STEP_MIN_BYTES, int(self.budget_bytes * STEP_SHARE))

    def use(self) -> Memory:
        import mlx.core as mx

        from mlx_serving.runtime.backend.space import HOLDERS, unwritten_bytes

        peak = mx.get_peak_memory()
        return Memory(
            budget_bytes=self.budget_bytes,
            active_bytes=mx.get_active_memory() - unwritten_bytes(),
            # Nobody knows how much of it was written then.
            peak_bytes=min(peak, host.peak_rss_bytes()) if HOLDERS else peak,
            cache_bytes=mx.get_cache_memory(),
            rss_bytes=host.rss_bytes(),
        )

    def give_back(self) -> None:
        import mlx.core as mx

        mx.clear_cache()
        _trim()


def _trim() -> None:
    """The C library keeps freed memory for itself unless it is asked."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
