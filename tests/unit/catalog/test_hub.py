"""Pulling from a hub: the real client, in processes of its own, against a stand-in server."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def safetensors(size: int) -> bytes:
    """A file of one tensor of `size` bytes."""
    text = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return len(text).to_bytes(8, "little") + text + (bytes(range(251)) * (size // 251 + 1))[:size]


def wait_for(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    until_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.01)


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
    # Large files are hashed as they come.
    small = total - len(fake_hub.files["model.safetensors"])
    assert result["tasks"] == [["pull org/tiny", total, total], ["check org/tiny", small, small]]
    again = pull()
    assert again == {"path": result["path"], "tasks": []}
    assert fake_hub.served["model.safetensors"] == len(fake_hub.files["model.safetensors"])


def test_a_cut_download_goes_on_where_it_was_cut(fake_hub: Any, pull: Any) -> None:
    fake_hub.files["model.safetensors"] = data = safetensors(24 << 20)
    fake_hub.cut_once["model.safetensors"] = 22 << 20
    result = pull()
    assert (Path(result["path"]) / "model.safetensors").read_bytes() == data
    assert fake_hub.ranges == [f"bytes={22 << 20}-"]
    assert fake_hub.served["model.safetensors"] == len(data)
    assert [done for _, _, done in result["tasks"]] == [total for _, total, _ in result["tasks"]]


def test_a_killed_pull_is_continued_by_the_next(fake_hub: Any, pull: Any) -> None:
    fake_hub.files["model.safetensors"] = data = safetensors(8 << 20)
    fake_hub.stall_once["model.safetensors"] = sent = 5 << 20
    process = pull.start()
    blobs = pull.folder / "hf" / "hub" / "models--org--tiny" / "blobs"
    wait_for(lambda: [p.stat().st_size for p in blobs.glob("*.part")] == [sent])
    process.kill()
    process.communicate()
    assert not list((pull.folder / "hf").rglob("snapshots/*/model.safetensors"))
    fake_hub.stalled.set()
    path = Path(pull()["path"])
    assert (path / "model.safetensors").read_bytes() == data
    assert fake_hub.ranges == [f"bytes={sent}-"]
    assert not list(blobs.glob("*.part"))


def test_a_part_that_is_wrong_is_fetched_anew(fake_hub: Any, pull: Any) -> None:
    """As after a crash of the machine, when the length is on disk and the bytes are not."""
    data = fake_hub.files["model.safetensors"]
    sha256 = hashlib.sha256(data).hexdigest()
    blobs = pull.folder / "hf" / "hub" / "models--org--tiny" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{sha256}.{sha256[:16]}.part").write_bytes(bytes(1000))
    path = Path(pull()["path"])
    assert (path / "model.safetensors").read_bytes() == data
    assert fake_hub.ranges == ["bytes=1000-"]


@pytest.mark.parametrize(
    ("status", "code"),
    [(401, "hub_unauthorized"), (403, "hub_forbidden"), (404, "model_not_found")],
)
def test_a_refused_file_says_why(fake_hub: Any, pull: Any, status: int, code: str) -> None:
    fake_hub.refused["model.safetensors"] = status
    assert pull()["code"] == code
    fake_hub.refused.clear()
    assert "path" in pull()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_disk_that_fills_up_is_said_and_the_rest_kept(fake_hub: Any, pull: Any) -> None:
    second = "model-2.safetensors"
    fake_hub.files[second] = safetensors(100)
    sha256 = hashlib.sha256(fake_hub.files["model.safetensors"]).hexdigest()
    blobs = pull.folder / "hf" / "hub" / "models--org--tiny" / "blobs"
    blobs.mkdir(parents=True)
    part = blobs / f"{sha256}.{sha256[:16]}.part"
    part.symlink_to("/dev/full")
    result = pull()
    assert (result["code"], "disk is full" in result["message"]) == ("no_space", True)
    assert not list((pull.folder / "hf").rglob("snapshots/*/model.safetensors"))
    part.unlink()
    assert (Path(pull()["path"]) / second).read_bytes() == fake_hub.files[second]


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


def test_what_follows_the_transformer_is_fetched_too(fake_hub: Any, pull: Any) -> None:
    """sentence-transformers keeps pooling and dense layers in folders of their own."""
    wanted = {
        "modules.json": b"[]",
        "1_Pooling/config.json": b'{"pooling_mode_cls_token": true}',
        "2_Dense/config.json": b"{}",
        "2_Dense/model.safetensors": safetensors(1000),
    }
    fake_hub.files |= wanted | {
        "2_Dense/pytorch_model.bin": b"\0",
        "1_Pooling/more/config.json": b"{}",
        "openvino/config.json": b"{}",
    }
    path = Path(pull()["path"])
    for name, content in wanted.items():
        assert (path / name).read_bytes() == content
    kept = {str(p.relative_to(path)) for p in path.rglob("*") if not p.is_dir()}
    assert kept == {*wanted, "config.json", "tokenizer.json", "model.safetensors"}
