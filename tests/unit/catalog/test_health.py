"""Broken files, or a runtime that cannot run them: a table, and one folder of each kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlx_serving.catalog.folder import Problem
from mlx_serving.catalog.health import (
    Broken,
    Healthy,
    Machine,
    Unable,
    describe,
    examine,
    judge,
    refuse,
    this_machine,
)
from mlx_serving.config import Config
from mlx_serving.errors import ModelBroken
from mlx_serving.host import Host
from model_folders import files, write_folder

PLAIN = Machine(extras=frozenset(), model_bytes=1000)
LARGE = Machine(extras=frozenset(), model_bytes=1 << 30)
BAD = Problem(file="config.json", kind="bad_json", detail="is not JSON")


@pytest.mark.parametrize(
    ("config", "kinds", "weights", "machine", "causes"),
    [
        ({"model_type": "llama"}, ("text",), 1000, PLAIN, []),
        ({"model_type": "scripted"}, ("text",), 0, PLAIN, []),
        ({"model_type": "mistral"}, ("text",), 0, PLAIN, []),
        ({"model_type": "llama"}, ("text",), 1001, PLAIN, ["model_too_large"]),
        (
            {"model_type": "llama"},
            ("text",),
            1 << 60,
            Machine(extras=frozenset(), model_bytes=None),
            [],
        ),
        ({"model_type": "nobodys"}, ("text",), 0, PLAIN, ["unsupported_architecture"]),
        ({"model_type": "nobodys"}, ("text",), 2000, PLAIN, ["unsupported_architecture", "model_too_large"]),
        ({"model_type": "nobodys_vl"}, ("text", "vision"), 0, PLAIN, ["extra_missing"]),
        (
            {"model_type": "nobodys_vl"},
            ("text", "vision"),
            0,
            Machine(extras=frozenset({"vision"}), model_bytes=1000),
            ["unsupported_architecture"],
        ),
        ({"model_type": "llama", "model_file": "evil.py"}, ("text",), 0, PLAIN, ["custom_code"]),
    ],
)  # fmt: skip
def test_what_cannot_run_and_why(
    config: dict[str, Any], kinds: Any, weights: int, machine: Machine, causes: list[str]
) -> None:
    verdict = judge((), config, kinds, weights, machine)
    assert [c.kind for c in verdict.causes] == causes if isinstance(verdict, Unable) else not causes


def test_broken_files_come_first() -> None:
    verdict = judge([BAD], {"model_type": "nobodys"}, ("text",), 1 << 60, PLAIN)
    assert verdict == Broken((BAD,))
    assert describe(verdict) == ("broken", "config.json: is not JSON")
    assert describe(Healthy()) == ("ok", None)


def test_a_refusal_has_the_causes_code(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", files(model_type="nobodys"))
    refuse(tmp_path, Healthy())
    with pytest.raises(ModelBroken, match="'nobodys' is unknown") as caught:
        refuse(folder, examine(folder, LARGE))
    assert caught.value.code == "unsupported_architecture"
    wrong = Problem(file="model.safetensors", kind="wrong_hash", detail="x")
    for problems, code in (((wrong,), "wrong_hash"), ((wrong, BAD), "corrupt_file")):
        with pytest.raises(ModelBroken) as caught:
            refuse(folder, Broken(problems))
        assert caught.value.code == code


def test_a_model_larger_than_the_machine_says_how_large(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", files(parameters=10_000))
    word, reason = describe(examine(folder, PLAIN))
    assert word == "cannot run"
    assert reason is not None and "it needs about" in reason and "fewer bits" in reason
    assert examine(folder, LARGE) == Healthy()


def test_a_cgroup_bounds_what_models_may_take() -> None:
    host = Host(
        python=(3, 11, 0),
        system="Linux",
        machine="x86_64",
        memory_bytes=1 << 40,
        memory_limit_bytes=1 << 30,
    )
    assert this_machine(Config(), host).model_bytes in (int((1 << 30) * 0.6), None)
    assert this_machine(Config(memory_budget=5e6), host).model_bytes in (5_000_000, None)
    assert this_machine(None, host).model_bytes is None
