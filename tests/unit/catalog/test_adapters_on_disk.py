"""Adapters on disk: fetched, checked without MLX, and told by the commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adapter_files import LAYER, write_adapter, write_tensors
from mlx_serving.adapter_folder import BadAdapter
from mlx_serving.catalog.adapters import ensure_adapter, read_adapter
from mlx_serving.catalog.ensure import ensure
from mlx_serving.catalog.health import Broken, Healthy, Unable, examine, this_machine
from mlx_serving.cli import health, show
from mlx_serving.config import Config
from mlx_serving.errors import ModelBroken

MACHINE = this_machine()


def peft(folder: Path, a: tuple[int, int], b: tuple[int, int], **config: object) -> Path:
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    names = {
        f"base_model.model.{LAYER}.lora_A.weight": a,
        f"base_model.model.{LAYER}.lora_B.weight": b,
    }
    write_tensors(folder / "adapter_model.safetensors", names)
    return folder


def test_what_a_folder_holds(tmp_path: Path) -> None:
    own = read_adapter(write_adapter(tmp_path / "own", elements=8))
    assert (own.kind, own.writer, own.rank, own.layers, own.held_bytes) == (
        "lora",
        "mlx-lm",
        1,
        1,
        64,
    )
    theirs = read_adapter(peft(tmp_path / "theirs", (2, 8), (6, 2)))
    assert (theirs.writer, theirs.rank, theirs.held_bytes) == ("peft", 2, 112)
    assert own.fingerprint() != theirs.fingerprint() == theirs.fingerprint()


def test_a_rank_is_the_same_on_both_sides(tmp_path: Path) -> None:
    with pytest.raises(BadAdapter, match=r"has rank 2, .* 3"):
        read_adapter(peft(tmp_path / "theirs", (2, 8), (6, 3)))


def test_the_verdict_is_a_models(tmp_path: Path) -> None:
    good = write_adapter(tmp_path / "good")
    assert examine(good, MACHINE) == Healthy()
    full = examine(write_adapter(tmp_path / "full", fine_tune_type="full"), MACHINE)
    assert isinstance(full, Unable) and full.causes[0].kind == "unsupported_adapter"
    (good / "adapters.safetensors").unlink()
    broken = examine(good, MACHINE)
    assert isinstance(broken, Broken)
    assert str(broken.problems[0]) == "adapters.safetensors: is missing"


def test_an_adapter_is_no_model_and_a_model_no_adapter(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    with pytest.raises(ModelBroken, match="holds an adapter: serve its model") as refused:
        ensure(str(folder), Config(home=str(tmp_path)))
    assert refused.value.code == "not_a_model"
    for source in ("smollm2-135m", str(tmp_path / "nothing")):
        with pytest.raises(ModelBroken) as missing:
            ensure_adapter(source, Config(home=str(tmp_path)))
        assert missing.value.code == "adapter_not_found"
    assert ensure_adapter(str(folder), Config(home=str(tmp_path))).path == folder


def test_the_commands_tell_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLX_SERVING_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = write_adapter(tmp_path / "a")
    assert show.run(str(folder)) == 0
    said = capsys.readouterr().out
    assert "lora of rank 1, written by mlx-lm" in said and "adapters.safetensors" in said
    assert show.run(str(folder), json=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["status"], report["adapter"]["layers"]) == ("ok", 1)
    (folder / "adapters.safetensors").write_bytes(b"")
    assert health.run(str(folder)) == 6
    assert "adapters.safetensors: is cut short" in capsys.readouterr().out
