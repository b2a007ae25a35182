"""Adapters on disk: fetched, checked without MLX, and told by the commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapter_files import LAYER, write_adapter, write_tensors
from contract import served
from mlx_serving.adapter_folder import BadAdapter
from mlx_serving.catalog.adapters import ensure_adapter, read_adapter
from mlx_serving.catalog.ensure import ensure
from mlx_serving.catalog.health import Broken, Healthy, Unable, examine, this_machine
from mlx_serving.catalog.inventory import inventory
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


@pytest.fixture
def adapter_hub(fake_hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stand-in of the hub with an adapter, as the processes that a test starts see it."""
    for name in [name for name in os.environ if name.startswith(("HF_", "MLX_SERVING_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_ENDPOINT", fake_hub.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("MLX_SERVING_HOME", str(tmp_path / "home"))
    folder = write_adapter(tmp_path / "a", 1)
    fake_hub.files = {file.name: file.read_bytes() for file in folder.iterdir()}
    return fake_hub


_ENSURE = """
from mlx_serving.catalog.adapters import ensure_adapter
from mlx_serving.config import Config
from mlx_serving.errors import ModelBroken
try:
    print(ensure_adapter("org/tiny", Config()).path)
except ModelBroken as error:
    print(error.code)
"""


def ensured() -> str:
    """The folder, or why there is none; in a process of its own, whose client knows the stand-in."""
    done = subprocess.run(
        [sys.executable, "-c", _ENSURE], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout.strip()


def test_one_of_the_hub_is_fetched(adapter_hub: Any) -> None:
    wanted = dict(adapter_hub.files)
    adapter_hub.files |= {"0000100_adapters.safetensors": b"\0", "train.py": b"1"}
    path = Path(ensured())
    assert {file.name: file.read_bytes() for file in path.iterdir()} == wanted


@pytest.mark.slow
def test_one_that_the_hub_does_not_give_says_why(adapter_hub: Any) -> None:
    for status, code in ((401, "hub_unauthorized"), (404, "adapter_not_found")):
        adapter_hub.status = status
        assert ensured() == code
    adapter_hub.status = 200
    path = ensured()
    adapter_hub.status = 503
    assert ensured() == path, "the hub is down, and it is in its cache"
    adapter_hub.status = 200
    Path(path, "adapters.safetensors").resolve().unlink()
    adapter_hub.corrupt.add("adapters.safetensors")
    assert ensured() == "wrong_hash"
    del adapter_hub.files["adapters.safetensors"]
    assert ensured() == "no_weights"


@pytest.mark.slow
def test_one_of_the_hub_is_served(adapter_hub: Any, scripted: Any, tmp_path: Path) -> None:
    """`MODEL+NAME` answers with its weights; the commands see it, and leave it while it is served."""
    flags = ("--adapter", "fr=org/tiny", "--home", str(tmp_path / "home"))
    models = [scripted(name="base", mode="hash")]
    with served.serving(models, *flags) as url, httpx.Client(base_url=url, timeout=120) as http:
        texts = [_say(http, name) for name in ("base", "base+fr", "fr")]
        assert texts[0] != texts[1] == texts[2]
        known = {model["id"]: model for model in http.get("/v1/models").json()["data"]}
        assert (known["base+fr"]["status"], known["base+fr"]["parent"]) == ("ready", "base")
        refused = json.loads(_command("rm", "org/tiny", "--yes", "--json").stdout)
        assert refused["code"] == "in_use"
        listed = json.loads(_command("list", "--json").stdout)["models"]
        (entry,) = [model for model in listed if model["name"] == "org/tiny"]
        assert (entry["status"], entry["adapter"]["kind"]) == ("ok", "lora")
    assert _command("rm", "org/tiny", "--yes").returncode == 0
    assert not Path(entry["path"]).exists()


def test_list_shows_those_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    home = tmp_path / "home"
    path = write_adapter(home / "models" / "french")
    write_adapter(tmp_path / "elsewhere")
    machine = this_machine()
    found = {entry.place.name: entry for entry in inventory(home, tmp_path / "hub", machine)}
    adapters = {name: entry.adapter for name, entry in found.items() if entry.adapter}
    assert list(adapters) == ["french"]
    assert adapters["french"].path == path
    assert ensure_adapter("french", Config(home=str(home))).path == path


def _say(http: httpx.Client, model: str) -> str:
    body = {"model": model, "prompt": "x" * 40, "max_tokens": 8, "temperature": 0}
    text: str = http.post("/v1/completions", json=body).raise_for_status().json()["choices"][0]["text"]  # fmt: skip
    return text


def _command(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mlx_serving", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
