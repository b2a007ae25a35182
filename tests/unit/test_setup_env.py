"""Which MLX a machine gets, and what an old Python is told."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def setup_env() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_env", ROOT / "scripts" / "setup_env.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("system", "driver", "extra"),
    [
        ("Darwin", None, ""),
        ("Linux", None, "cpu"),
        ("Linux", "580.65.06", "cuda13"),
        ("Linux", "595.10", "cuda13"),
        ("Linux", "550.54.14", "cuda12"),
        ("Linux", "470.82.01", "cpu"),
        ("Linux", "[N/A]", "cpu"),
    ],
)
def test_which_backend(setup_env: ModuleType, system: str, driver: str | None, extra: str) -> None:
    assert setup_env.pick_extra(system, driver) == extra


def test_the_backends_are_extras_of_the_package(setup_env: ModuleType) -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = set(project["optional-dependencies"])
    assert {"cpu", "dev", *(extra for _, extra in setup_env.CUDA_EXTRAS)} <= extras
    assert project["requires-python"] == ">=" + ".".join(map(str, setup_env.NEEDED))


def test_an_old_python_is_told_what_is_needed(setup_env: ModuleType) -> None:
    assert "needs Python 3.11 or newer" in setup_env.complaint((3, 9, 18))
    assert setup_env.complaint(sys.version_info) is None
