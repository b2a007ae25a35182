"""Pulling from a hub: the real client, in processes of its own, against a stand-in server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def safetensors(size: int) -> bytes:
    """A file of one tensor of `size` bytes."""
    text = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return len(text).to_bytes(8, "little") + text + (bytes(range(251)) * (size // 251 + 1))[:size]


def test_only_what_serving_needs_is_fetched_and_counted(fake_hub: Any, pull: Any) -> None:
    result = pull()
    path = Path(result["path"])
    assert sorted(p.name for p in path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        assert (path / name).read_bytes() == fake_hub.files[name]
    total = sum(len(fake_hub.files[p.name]) for p in path.iterdir())
    assert result["tasks"] == [["pull org/tiny", total, total], ["check org/tiny", total, total]]
    again = pull()
    assert again == {"path": result["path"], "tasks": []}
    assert fake_hub.served["model.safetensors"] == len(fake_hub.files["model.safetensors"])


def test_a_cut_download_goes_on_where_it_was_cut(fake_hub: Any, pull: Any) -> None:
    fake_hub.files["model.safetensors"] = data = safetensors(24 << 20)
    fake_hub.cut_once["model.safetensors"] = 22 << 20
    result = pull()
    assert (Path(result["path"]) / "model.safetensors").read_bytes() == data
    # The client writes 10 MiB at a time; what it had not written is sent again.
    assert fake_hub.ranges == [f"bytes={20 << 20}-"]
    assert fake_hub.served["model.safetensors"] == len(data) + (2 << 20)
    assert [done for _, _, done in result["tasks"]] == [total for _, total, _ in result["tasks"]]


def test_a_second_pull_fetches_only_what_is_missing(fake_hub: Any, pull: Any) -> None:
    path = Path(pull()["path"])
    (path / "tokenizer.json").resolve().unlink()
    (path / "tokenizer.json").unlink()
    assert pull()["path"] == str(path)
    assert (path / "tokenizer.json").read_bytes() == fake_hub.files["tokenizer.json"]
    assert fake_hub.served["model.safetensors"] == len(fake_hub.files["model.safetensors"])


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_with_the_wrong_hash_is_named_and_deleted(
    fake_hub: Any, pull: Any, name: str
) -> None:
    fake_hub.corrupt.add(name)
    result = pull()
    assert (result["error"], result["code"]) == ("ModelBroken", "wrong_hash")
    assert name in result["message"]
    kept = {p.name for p in (pull.folder / "hf").rglob("snapshots/*/*")}
    assert name not in kept
    assert kept
    fake_hub.corrupt.clear()
    path = Path(pull()["path"])
    assert (path / name).read_bytes() == fake_hub.files[name]


@pytest.mark.parametrize(
    ("status", "error_code", "error", "code", "said"),
    [
        (401, "RepoNotFound", "ModelBroken", "hub_unauthorized", "HF_TOKEN"),
        (403, "GatedRepo", "ModelBroken", "hub_forbidden", "licence"),
        (403, "", "ModelBroken", "hub_forbidden", "HF_TOKEN"),
        (404, "RepoNotFound", "ModelNotFound", "model_not_found", "no model org/tiny"),
    ],
)
def test_refusals_say_what_to_do(fake_hub: Any, pull: Any, status: int, error_code: str, error: str, code: str, said: str) -> None:  # fmt: skip
    fake_hub.status, fake_hub.error_code = status, error_code
    result = pull()
    assert (result["error"], result["code"]) == (error, code)
    assert said in result["message"]


def test_a_missing_revision_is_named(pull: Any) -> None:
    result = pull(revision="nowhere")
    assert (result["error"], "nowhere" in result["message"]) == ("ModelNotFound", True)


def test_offline_uses_the_cache_or_says_so(fake_hub: Any, pull: Any) -> None:
    assert pull(offline=True)["code"] == "offline"
    path = pull()["path"]
    assert pull(offline=True)["path"] == path
    assert pull(HF_HUB_OFFLINE="1")["path"] == path
    fake_hub.status = 503
    assert pull(HF_ENDPOINT="http://127.0.0.1:9")["path"] == path


def test_an_unreachable_hub_is_a_typed_error(pull: Any) -> None:
    assert pull(HF_ENDPOINT="http://127.0.0.1:9")["code"] == "hub_unreachable"


def test_a_repository_without_safetensors_names_its_gguf_files(fake_hub: Any, pull: Any) -> None:
    del fake_hub.files["model.safetensors"]
    fake_hub.files["tiny.Q4_0.gguf"] = b"GGUF"
    result = pull()
    assert result["code"] == "no_weights"
    assert "tiny.Q4_0.gguf" in result["message"]


def test_two_processes_at_once_fetch_a_file_once(fake_hub: Any, pull: Any) -> None:
    processes = [pull.start(), pull.start()]
    paths = {pull.result(process)["path"] for process in processes}
    assert len(paths) == 1
    assert fake_hub.served["model.safetensors"] == len(fake_hub.files["model.safetensors"])


def test_a_full_disk_is_told_before_anything_is_fetched(fake_hub: Any, pull: Any) -> None:
    fake_hub.claimed["model.safetensors"] = 1 << 60
    assert pull()["code"] == "no_space"
    assert not fake_hub.served
