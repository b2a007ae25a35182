"""Large files over HTTP, against a server that keeps to the rules of ranges or does not."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mlx_serving.catalog.download import Download, Refused, download_all
from mlx_serving.errors import ModelBroken

DATA = bytes(i % 251 for i in range(300_000))


@dataclass
class Server:
    ranges: bool = True
    statuses: list[int] = field(default_factory=list)
    """Of the requests to come, before it answers 200."""
    extra: bytes = b""
    seen: list[str | None] = field(default_factory=list)
    """Each request's Range."""
    url: str = ""


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            wanted = self.headers["Range"]
            state.seen.append(wanted)
            start = int(wanted[6:-1]) if wanted and state.ranges else 0
            status = state.statuses.pop(0) if state.statuses else 206 if start else 200
            body = (DATA + state.extra)[start:] if status in (200, 206) else b""
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{http.server_address[1]}/file"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield state
    http.shutdown()
    http.server_close()
    thread.join()


def one(server: Server, folder: Path, sha256: str = "", name: str = "file") -> Download:
    digest = sha256 or hashlib.sha256(DATA).hexdigest()
    return Download(name, server.url, folder / name, digest, len(DATA))


def test_a_file_appears_whole(server: Server, tmp_path: Path) -> None:
    done: list[int] = []
    files = [one(server, tmp_path, name=str(i)) for i in range(6)]
    download_all(files, done.append)
    assert all(file.target.read_bytes() == DATA for file in files)
    assert sum(done) == 6 * len(DATA)
    assert [file.missing_bytes() for file in files] == [0] * 6
    download_all(files, done.append)
    assert len(server.seen) == 6
    assert sorted(p.name for p in tmp_path.iterdir()) == list("012345")


def test_what_is_there_is_not_sent_again(server: Server, tmp_path: Path) -> None:
    file, done = one(server, tmp_path), list[int]()
    file.part.write_bytes(DATA[:1000])
    assert file.missing_bytes() == len(DATA) - 1000
    download_all([file], done.append)
    assert file.target.read_bytes() == DATA
    assert (server.seen, sum(done)) == (["bytes=1000-"], len(DATA) - 1000)


def test_a_whole_part_needs_no_request(server: Server, tmp_path: Path) -> None:
    file = one(server, tmp_path)
    file.part.write_bytes(DATA)
    download_all([file], lambda _: None)
    assert (file.target.read_bytes(), server.seen) == (DATA, [])


def test_a_server_without_ranges_begins_anew(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    file, done = one(server, tmp_path), list[int]()
    file.part.write_bytes(DATA[:1000])
    download_all([file], done.append)
    assert file.target.read_bytes() == DATA
    assert sum(done) == len(DATA) - 1000


def test_a_busy_server_is_asked_again(server: Server, tmp_path: Path) -> None:
    server.statuses = [503]
    download_all([one(server, tmp_path)], lambda _: None)
    assert len(server.seen) == 2


@pytest.mark.parametrize("status", [401, 404])
def test_a_refusal_is_told_at_once(server: Server, tmp_path: Path, status: int) -> None:
    server.statuses = [status]
    with pytest.raises(Refused) as caught:
        download_all([one(server, tmp_path)], lambda _: None)
    assert caught.value.status == status
    assert len(server.seen) == 1


@pytest.mark.parametrize("extra", [b"", b"more than was promised"])
def test_another_content_is_refused_and_deleted(
    server: Server, tmp_path: Path, extra: bytes
) -> None:
    server.extra = extra
    file = one(server, tmp_path, sha256="" if extra else "0" * 64)
    with pytest.raises(ModelBroken) as caught:
        download_all([file], lambda _: None)
    assert caught.value.code == "wrong_hash"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_said(server: Server, tmp_path: Path) -> None:
    file = one(server, tmp_path)
    file.part.symlink_to("/dev/full")
    with pytest.raises(ModelBroken, match="disk is full") as caught:
        download_all([file], lambda _: None)
    assert caught.value.code == "no_space"
