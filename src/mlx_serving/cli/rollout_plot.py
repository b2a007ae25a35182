"""A rollout's differences drawn: a line a metric, in text or as a PNG (extra `plots`)."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TextIO

from mlx_serving.cli.exits import Exit
from mlx_serving.cli.say import Say

WIDTH = 61
"""Columns of the scale; its middle is no difference."""


def draw(report: Mapping[str, Any], png: str | None, say: Say, out: TextIO | None = None) -> int:
    """Draw to `png`, or as text on stdout."""
    metrics = [
        (m["metric"], *map(_number, (m["low"], m["difference"], m["high"])))
        for m in report["metrics"]
    ]
    if not metrics:
        say.error("too_early", "there are not enough answers on both sides to compare yet")
        return Exit.FAILED
    if png is None:
        _text(metrics, out or sys.stdout)
        return Exit.OK
    return _png(metrics, report, png, say)


def _number(said: str) -> float:
    """`+4.2 %` or `-1.0 points` as a number."""
    return float(said.split()[0])


def _text(metrics: list[tuple[str, float, float, float]], out: TextIO) -> None:
    reach = max(max(abs(low), abs(high)) for _, low, _, high in metrics) or 1.0
    middle = WIDTH // 2

    def column(value: float) -> int:
        return middle + round(value / reach * middle)

    name_width = max(len(name) for name, *_ in metrics)
    for name, low, estimate, high in metrics:
        line = [" "] * WIDTH
        for i in range(column(low), column(high) + 1):
            line[i] = "-"
        line[middle] = "|"
        line[column(estimate)] = "o"
        print(f"{name.ljust(name_width)} {''.join(line)} {estimate:+.1f}", file=out)
    scale = f"{-reach:.1f}".ljust(middle) + "0" + f"{reach:+.1f}".rjust(WIDTH - middle - 1)
    print(f"{''.ljust(name_width)} {scale}", file=out)
    print("o: the variant's difference, in % or points; ---: its bound at every look", file=out)


def _png(
    metrics: list[tuple[str, float, float, float]], report: Mapping[str, Any], png: str, say: Say
) -> int:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        say.error("extra_missing", "a PNG needs matplotlib", "pip install 'mlx-serving[plots]'")
        return Exit.FAILED
    figure = Figure(figsize=(8, 1 + 0.5 * len(metrics)), layout="constrained")
    axes = figure.subplots()
    for i, (_, low, estimate, high) in enumerate(reversed(metrics)):
        axes.plot([low, high], [i, i], color="0.5")
        axes.plot([estimate], [i], "o", color="C0")
    axes.axvline(0, color="0.2", linewidth=0.8)
    axes.set_yticks(range(len(metrics)), [name for name, *_ in reversed(metrics)])
    axes.set_xlabel("difference of the variant, % or points")
    axes.set_title(f"{report['name']}: {report['variant']} against {report['model']}")
    figure.savefig(png)
    say.event("drawn", f"drawn to {png}", file=png)
    return Exit.OK
