"""A rollout's differences, drawn as text and into a file."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

from mlx_serving.cli import rollout_plot, rollout_png, rollouts
from mlx_serving.cli.admin import Server
from mlx_serving.cli.exits import Exit
from mlx_serving.cli.say import Say
from mlx_serving.cli.where import Where


def metric(name: str, low: float, difference: float, high: float, unit: str = "%") -> dict:
    return {"metric": name, "low": low, "difference": difference, "high": high, "unit": unit}


METRICS = [
    metric("error", -2.0, 0.0, 2.0, "points"),
    metric("tpot", 12.0, 30.0, 60.0),
    metric("ttft", -64.0, -22.0, 680.0),
]
REPORT: dict[str, Any] = {
    "name": "canary",
    "model": "qwen3-8bit",
    "variant": "qwen3-4bit",
    "samples": [120, 40],
    "metrics": METRICS,
}


def test_a_bound_that_leaves_the_scale_ends_at_its_edge() -> None:
    lines = rollout_plot.draw(METRICS).splitlines()
    error, tpot, ttft, scale, _ = lines
    middle = tpot.index("|")
    assert error[middle] == "o"
    assert middle < tpot.index("-") < tpot.rindex("o")
    assert ttft.split("-22.0")[0].rstrip().endswith("-")
    assert "-100.0" in scale and "+100.0" in scale


def test_a_picture(tmp_path: Path) -> None:
    from PIL import Image

    rollout_png.draw(REPORT, tmp_path / "a")
    with Image.open(tmp_path / "a") as picture:
        assert picture.format == "PNG"
        colors = {color for _, color in picture.convert("RGB").getcolors(1 << 20) or []}
    wanted = {tuple(bytes.fromhex(c[1:])) for c in (rollout_png.SURE, rollout_png.UNSURE)}
    assert wanted <= colors


class Answers(Server):
    """With a report, of whatever is asked."""

    def __init__(self, say: Say) -> None:
        super().__init__(Where("http://test"), None, say)

    def call(self, method: str, path: str, body: object = None) -> Any:
        return REPORT


def test_without_its_library_the_extra_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    err = io.StringIO()
    found = rollouts.plot(Answers(Say(err=err)), "canary", tmp_path / "a.png")
    assert found == Exit.FAILED and "mlx-serving[plot]" in err.getvalue()
    assert not (tmp_path / "a.png").exists()


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    err = io.StringIO()
    found = rollouts.plot(Answers(Say(err=err)), "canary", tmp_path / "none" / "a.png")
    assert found == Exit.FAILED and "none/a.png cannot be written" in err.getvalue()
