"""A rollout's differences as a picture, drawn by matplotlib (the extra `plot`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_serving.cli.rollout_plot import reach

SURE, UNSURE = "#1f5f99", "#9aa5b1"


def draw(report: Mapping[str, Any], file: Path) -> None:
    """Each metric's estimate and bound, as `rollout_plot.draw` has them. Raises ImportError, OSError."""
    from matplotlib.figure import Figure

    metrics = report["metrics"]
    farthest = reach(metrics)
    figure = Figure(figsize=(8.0, 1.6 + 0.4 * len(metrics)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(0.0, color="black", linewidth=0.8)
    for row, m in enumerate(metrics):
        color = SURE if m["low"] > 0 or m["high"] < 0 else UNSURE
        bound = [max(-farthest, m["low"]), min(farthest, m["high"])]
        axes.plot(bound, [row, row], color=color, linewidth=2.5)
        estimate = max(-farthest, min(farthest, m["difference"]))
        axes.plot([estimate], [row], "o", color=color, clip_on=False)
    axes.set_yticks(range(len(metrics)), [f"{m['metric']} ({m['unit']})" for m in metrics])
    axes.set_ylim(len(metrics) - 0.5, -0.5)
    axes.set_xlim(-farthest, farthest)
    axes.grid(axis="x", alpha=0.3)
    ours, theirs = report["samples"]
    axes.set_title(
        f"{report['name']}: {report['variant']} ({theirs} requests)\n"
        f"beside {report['model']} ({ours} requests)"
    )
    axes.set_xlabel("difference and its bound at every look; dark: surely not 0")
    figure.savefig(file, format="png")
