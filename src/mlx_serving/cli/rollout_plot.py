"""A rollout's differences as text: a line a metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

WIDTH = 61
"""Columns of the scale; its middle is no difference."""
FARTHEST = 100.0
"""In % or points: bounds of few answers lie farther, and would leave the rest no room."""


def reach(metrics: Sequence[Mapping[str, Any]]) -> float:
    """How far the scale goes to either side of no difference."""
    return min(max(max(abs(m["low"]), abs(m["high"])) for m in metrics) or 1.0, FARTHEST)


def draw(metrics: Sequence[Mapping[str, Any]]) -> str:
    """Each metric's estimate and bound on one scale, in % or percentage points."""
    farthest, middle = reach(metrics), WIDTH // 2

    def column(value: float) -> int:
        return middle + round(max(-1.0, min(1.0, value / farthest)) * middle)

    name_width = max(len(m["metric"]) for m in metrics)
    lines = []
    for m in metrics:
        line = [" "] * WIDTH
        for i in range(column(m["low"]), column(m["high"]) + 1):
            line[i] = "-"
        line[middle] = "|"
        line[column(m["difference"])] = "o"
        lines.append(f"{m['metric'].ljust(name_width)} {''.join(line)} {m['difference']:+.1f}")
    scale = f"{-farthest:.1f}".ljust(middle) + "0" + f"{farthest:+.1f}".rjust(WIDTH - middle - 1)
    lines.append(f"{''.ljust(name_width)} {scale}")
    lines.append("o: the variant's difference, in % or points; ---: its bound at every look")
    return "\n".join(lines)
