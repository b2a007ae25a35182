"""How much memory the device has for weights and KV. No MLX at import."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CPU_SHARE = 0.6
"""Of the machine's (or the cgroup's) memory, which the gateway and others share."""
GPU_SHARE = 0.85
"""Of the device's working set: the rest is for activations and the allocator's cache."""

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def machine_memory_bytes(limit_files: tuple[str, ...] = _CGROUP_LIMITS) -> int:
    """Physical memory, or the cgroup's limit (v2, v1) where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in limit_files:
        try:
            text = Path(name).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            total = min(total, int(text))
    return total


def device_memory_bytes(info: Mapping[str, Any]) -> int | None:
    """Of a GPU, from `mx.device_info()`; None where it says nothing of memory (the CPU)."""
    for key in ("max_recommended_working_set_size", "memory_size", "total_memory"):
        value = info.get(key)
        if isinstance(value, int) and value > 0:
            return value
    return None


def model_budget_bytes(info: Mapping[str, Any], gpu: bool) -> int:
    """What weights and KV together may take."""
    device = device_memory_bytes(info) if gpu else None
    if device is None:
        return int(machine_memory_bytes() * CPU_SHARE)
    return int(device * GPU_SHARE)
