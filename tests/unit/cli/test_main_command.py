"""The other commands as a shell runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mlx_serving import __version__
from mlx_serving.cli.exits import Exit


def run(*args: str, stdin: str = "", home: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("MLX_SERVING_")}
    if home is not None:
        env["MLX_SERVING_HOME"] = str(home)
    return subprocess.run(
        [sys.executable, "-m", "mlx_serving", *args],
        env=env,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("args", [["version"], ["--version"]])
def test_version(args: list[str]) -> None:
    assert run(*args).stdout == __version__ + "\n"


def test_help_lists_every_command() -> None:
    text = run("--help").stdout
    commands = ("serve", "chat", "pull", "list", "show", "health", "repair", "convert", "rm", "ps")
    for command in (*commands, "doctor", "restart", "reload", "version"):
        assert f" {command} " in text


def test_pulling_what_does_not_exist(tmp_path: Path) -> None:
    job = run("pull", str(tmp_path / "nothing"), "--json", home=tmp_path)
    assert job.returncode == Exit.NO_MODEL, job.stderr
    assert json.loads(job.stdout)["code"] == "model_not_found"


class Parrot(BaseHTTPRequestHandler):
    """One model that repeats what it is told."""

    def do_GET(self) -> None:
        self._send("application/json", json.dumps({"data": [{"id": "parrot"}]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        chunk = {"choices": [{"delta": {"content": body["messages"][-1]["content"]}}]}
        self._send("text/event-stream", f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n")

    def _send(self, kind: str, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def parrot() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Parrot) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_a_piped_question_is_answered_once(parrot: str) -> None:
    job = run("chat", "--url", parrot, stdin="polly\nwants\n")
    assert (job.returncode, job.stdout) == (Exit.OK, "polly\nwants\n")


def test_a_server_that_is_not_there() -> None:
    job = run("chat", "--url", "http://127.0.0.1:1", stdin="hi")
    assert job.returncode == Exit.FAILED
    assert "http://127.0.0.1:1" in job.stderr
    assert "Traceback" not in job.stderr
