"""The commands about models, run in this process on folders of a few bytes."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from mlx_serving.cli import health as health_command
from mlx_serving.cli import list as list_command
from mlx_serving.cli import repair as repair_command
from mlx_serving.cli import rm as rm_command
from mlx_serving.cli import show as show_command
from mlx_serving.cli.exits import Exit
from mlx_serving.cli.models import count
from mlx_serving.cli.table import print_facts, print_table
from model_folders import DAMAGES, WEIGHTS, files, write_folder, write_hub


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Homes of our own: `home` for converted models, `hub` for the hub's cache."""
    monkeypatch.setenv("MLX_SERVING_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def report(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The models of the one JSON document on stdout, by name."""
    value = json.loads(capsys.readouterr().out)
    return {model["name"]: model for model in value["models"]}


def test_list_as_a_plain_table(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_hub(shelf / "hub", "org/large", files(parameters=400))
    small = write_hub(shelf / "hub", "org/small", files(parameters=100))
    (small / "tokenizer.json").unlink()
    assert list_command.run() == Exit.OK
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == list(list_command.HEADERS)
    large = next(line for line in lines if line.startswith("org/large"))
    assert large.split() == [
        "org/large", "ok", "2.0", "kB", "LlamaForCausalLM", "400", "bfloat16", "512", "text",
    ]  # fmt: skip
    assert any(line.startswith("org/small: tokenizer.json: is missing") for line in lines)


def test_list_as_json(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_hub(shelf / "hub", "org/large", files(parameters=400))
    write_hub(shelf / "hub", "org/small", files(parameters=100))
    assert list_command.run(json=True) == Exit.OK
    models = report(capsys)
    assert models["smollm2-135m"]["status"] == "not_fetched"
    large = models["org/large"]
    assert (large["status"], large["parameters"], large["drafts"]) == ("ok", 400, ["org/small"])


@pytest.mark.parametrize("damage", DAMAGES)
def test_health_tells_broken_files_from_what_cannot_run(
    shelf: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    do, code, named, how = DAMAGES[damage]
    model = write_hub(shelf / "hub", "org/model", files())
    assert health_command.run("org/model") == Exit.OK
    do(model)
    capsys.readouterr()
    status = health_command.run("org/model", json=True)
    found = report(capsys)["org/model"]
    assert named in found["reason"] and how in found["reason"]
    unable = code == "unsupported_architecture"
    assert status == (Exit.CANNOT_RUN if unable else Exit.FILES_BROKEN)
    assert bool(found["problems"]) != unable == bool(found["causes"])
    assert list_command.run(json=True) == Exit.OK
    assert report(capsys)["org/model"]["reason"] == found["reason"]


def test_a_runtime_that_cannot_run_a_model_has_an_exit_code_of_its_own(
    shelf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(shelf / "home" / "models" / "odd", files(model_type="nobodys"))
    assert health_command.run("odd") == Exit.CANNOT_RUN
    said = capsys.readouterr().out
    assert "CANNOT RUN  odd" in said and "[unsupported_architecture]" in said
    write_folder(shelf / "home" / "models" / "bad", {})
    assert health_command.run(None) == Exit.FILES_BROKEN
    said = capsys.readouterr().out
    assert "BROKEN      bad" in said and "mlx-serving repair bad" in said


def test_a_folder_of_unknown_origin_is_not_said_to_be_repairable(
    shelf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shelf / "mine"
    write_folder(folder, {})
    assert health_command.run(str(folder)) == Exit.FILES_BROKEN
    said = capsys.readouterr().out
    assert "BROKEN      mine" in said and str(folder) in said and "repair" not in said


def test_a_gguf_file_that_is_here_is_not_said_to_be_missing(
    shelf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = shelf / "mine.gguf"
    file.write_bytes(b"GGUF")
    assert health_command.run(str(file)) == Exit.NO_MODEL
    assert f"{file} is not converted; `mlx-serving pull {file}`" in capsys.readouterr().err


def test_health_reads_what_nobody_has_read(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_hub(shelf / "hub", "org/model", files())
    data = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).resolve().write_bytes(data[:-1] + b"!")
    assert list_command.run(json=True) == Exit.OK
    assert report(capsys)["org/model"]["status"] == "ok"
    assert health_command.run(None) == Exit.FILES_BROKEN
    capsys.readouterr()
    list_command.run(json=True)
    assert report(capsys)["org/model"]["problems"][0]["kind"] == "wrong_hash"
    assert health_command.run("org/model", deep=True) == Exit.FILES_BROKEN


def test_a_model_that_is_nowhere_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert health_command.run("org/absent") == Exit.NO_MODEL
    assert "mlx-serving pull org/absent" in capsys.readouterr().err


def test_a_table_is_drawn_on_a_terminal_alone() -> None:
    plain, drawn = io.StringIO(), Terminal()
    rows = [("[bold]a", "1"), ("b", "22")]
    print_table(("NAME", "N"), rows, plain)
    assert plain.getvalue() == "NAME     N\n[bold]a  1\nb        22\n"
    print_table(("NAME", "N"), rows, drawn)
    assert "[bold]a" in drawn.getvalue() and "─" in drawn.getvalue()
    facts = io.StringIO()
    print_facts((("name", "x"), ("nothing", ""), ("licence", "mit")), facts)
    assert facts.getvalue() == "name     x\nlicence  mit\n"


def test_a_table_that_does_not_fit_is_not_squeezed(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "a-model-with-a-long-name"
    for columns, drawn in (("20", False), ("40", True)):
        monkeypatch.setenv("COLUMNS", columns)
        out = Terminal()
        print_table(("NAME", "N"), [(name, "1")], out)
        assert name in out.getvalue() and ("─" in out.getvalue()) == drawn


def test_large_numbers_are_short() -> None:
    assert [count(n) for n in (None, 12, 1500, 134_515_008, 7_240_000_000)] == [
        "",
        "12",
        "1.5k",
        "134.5M",
        "7.2B",
    ]


def test_show_says_all_that_is_known(scripted: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model = scripted("shown", text="x", chat_template="{{ messages }}<tool_call>{{ tools }}")
    assert show_command.run(str(model), json=True) == Exit.OK
    shown = json.loads(capsys.readouterr().out)
    assert (shown["name"], shown["status"], shown["context_length"]) == ("shown", "ok", 512)
    assert shown["chat"] == {
        "template": True,
        "tools": True,
        "thinking": False,
        "tool_parser": "hermes",
        "reasoning_parser": None,
    }
    assert shown["caches"]["prefix_reuse"] == "none"
    assert {file["name"] for file in shown["files"]} >= {"config.json", "tokenizer.json"}
    assert show_command.run(str(model)) == Exit.OK
    text = capsys.readouterr().out
    assert "prefix reuse   no: " in text and "tool parser    hermes" in text


def test_show_of_a_broken_model_says_what_is_wrong(
    shelf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(shelf / "home" / "models" / "bad", files() | {"config.json": b"{"})
    assert show_command.run("bad") == Exit.OK
    assert "broken: config.json: is not JSON" in capsys.readouterr().out
    assert show_command.run("absent") == Exit.NO_MODEL


def test_rm_asks_first(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_folder(shelf / "home" / "models" / "mine")
    assert rm_command.run(["mine"]) == Exit.FAILED  # nobody is there to say yes
    assert path.is_dir() and "--yes" in capsys.readouterr().err
    assert rm_command.run(["mine"], yes=True, json=True) == Exit.OK
    told = json.loads(capsys.readouterr().out)
    assert (told["name"], told["freed_bytes"]) == ("mine", sum(map(len, files().values())))
    assert not path.exists()
    assert rm_command.run(["mine"], yes=True) == Exit.NO_MODEL


def test_repair_says_what_it_did(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(shelf / "home" / "models" / "good")
    assert repair_command.run("good") == Exit.OK
    assert "no file is broken" in capsys.readouterr().out
    write_folder(shelf / "home" / "models" / "odd", files(model_type="nobodys"))
    assert repair_command.run("odd", json=True) == Exit.CANNOT_RUN
    assert json.loads(capsys.readouterr().out)["status"] == "cannot_run"
    write_folder(shelf / "home" / "models" / "bad", {})
    assert repair_command.run("bad") == Exit.NO_MODEL
    assert "nothing tells its origin" in capsys.readouterr().err
