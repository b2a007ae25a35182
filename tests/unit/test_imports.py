"""What importing each part brings along: laziness is how the server answers within half a second."""

from __future__ import annotations

import functools
import json
import subprocess
import sys

import pytest

HEAVY = {"mlx", "mlx_lm", "transformers", "torch", "numpy"}


@functools.cache
def modules_after(statement: str) -> frozenset[str]:
    """Names in sys.modules after a statement in a fresh interpreter."""
    code = f"{statement}\nimport json, sys; print(json.dumps(sorted(sys.modules)))"
    job = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return frozenset(json.loads(job.stdout))


def test_the_package_alone_is_next_to_nothing() -> None:
    ours = {m for m in modules_after("import mlx_serving") if m.startswith("mlx_serving")}
    assert ours == {"mlx_serving"}
    brought = modules_after("import mlx_serving") - modules_after("import typing")
    assert len(brought) < 10, sorted(brought)


@pytest.mark.parametrize(
    "module",
    [
        "mlx_serving.cli",
        "mlx_serving.cli.app",
        "mlx_serving.cli.serve",
        "mlx_serving.engine",
        "mlx_serving.gateway",
        "mlx_serving.api.app",
        "mlx_serving.api.server",
        "mlx_serving.worker.supervisor",
    ],
)
def test_the_parent_never_brings_mlx(module: str) -> None:
    brought = modules_after(f"import {module}")
    assert module in brought
    assert HEAVY & brought == set()
    assert not [m for m in brought if m.startswith("mlx_serving.runtime")]


@pytest.mark.parametrize("absent", ["typer", "rich", "yaml", "httpx", "huggingface_hub", "jinja2"])
def test_what_serving_needs_only_later_is_not_there_at_first(absent: str) -> None:
    serving = "import mlx_serving.cli.serve, mlx_serving.api.server, mlx_serving.engine"
    assert absent not in modules_after(serving)
