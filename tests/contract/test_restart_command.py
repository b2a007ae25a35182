"""`mlx-serving restart` and SIGHUP, with a real server and a real client."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import httpx
import pytest

import commands

Serve = Callable[..., tuple[subprocess.Popen[str], str]]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts servers with `serve(model, *flags)` and gives (process, URL)."""
    servers: list[subprocess.Popen[str]] = []

    def start(model: Path, *flags: str) -> tuple[subprocess.Popen[str], str]:
        env = {k: v for k, v in os.environ.items() if not k.startswith("MLX_SERVING_")}
        command = [sys.executable, "-m", "mlx_serving", "serve", str(model), "--json"]
        server = subprocess.Popen(
            [*command, "--port", "0", *flags],
            stdout=subprocess.PIPE,
            text=True,
            env=env,
            start_new_session=True,
        )
        servers.append(server)
        assert server.stdout is not None
        url = json.loads(server.stdout.readline())["url"]
        assert json.loads(server.stdout.readline())["event"] == "model_loaded"
        return server, url

    yield start
    for server in servers:
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0


def texts(lines: Iterator[str]) -> Iterator[str]:
    """The pieces of a streamed completion, to its [DONE]."""
    for line in lines:
        if line == "data: [DONE]":
            return
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))["choices"][0]["text"]
    raise AssertionError("the stream broke off")


@pytest.mark.parametrize("how", ["command", "signal"])
def test_a_restart_replaces_the_worker_under_a_stream(scripted, serve: Serve, how: str) -> None:
    server, url = serve(scripted(mode="cycle", token_ids=[97], step_delay_ms=5))
    with httpx.Client(base_url=url, timeout=120) as http:
        before = http.get("/health").json()
        body = {"model": "scripted", "prompt": "x", "max_tokens": 400, "stream": True}
        with http.stream("POST", "/v1/completions", json=body) as response:
            pieces = texts(response.iter_lines())
            got = next(pieces)
            if how == "command":
                job = commands.run("restart", "--url", url)
                assert job.returncode == 0, job.stderr
            else:
                server.send_signal(signal.SIGHUP)
            got += "".join(pieces)
        assert got == "a" * 400
        while http.get("/ready").status_code != 200:
            pass
        after = http.get("/health").json()
    assert before["pid"] == after["pid"] == server.pid
    assert after["workers"][0]["restarts"] == 1
    assert after["workers"][0]["pid"] != before["workers"][0]["pid"]
    assert (after["status"], after["reasons"]) == ("ready", [])


def test_a_closed_terminal_stops_the_server(scripted) -> None:
    """The kernel tells both by SIGHUP; only a server that still has its terminal restarts."""
    ours, theirs = pty.openpty()

    def in_the_terminal() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests themselves may run under nohup
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    command = [sys.executable, "-m", "mlx_serving", "serve", str(scripted(text="x")), "--json"]
    server = subprocess.Popen(
        [*command, "--port", "0"],
        stdin=theirs,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=in_the_terminal,
    )
    os.close(theirs)
    assert server.stdout is not None and "listening" in server.stdout.readline()
    os.close(ours)
    assert server.wait(30) == 0


def test_restart_says_when_nobody_is_there() -> None:
    job = commands.run("restart", "--url", "http://127.0.0.1:9")
    assert job.returncode == 1
    assert "no server of ours answers" in job.stderr


def test_restart_signals_no_process_that_is_not_a_server() -> None:
    """As when the port is a container's: the process of that id here is another's."""
    victim = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)

    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"pid": victim.pid}).encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Health) as other:
        Thread(target=other.handle_request, daemon=True).start()
        job = commands.run("restart", "--url", f"http://127.0.0.1:{other.server_port}")
    assert job.returncode == 1 and "does not run on this machine" in job.stderr
    assert victim.communicate(b"\n") == (None, None) and victim.returncode == 0
