"""`serve` from the outside: what it says and how it ends."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_serving.cli.exits import Exit
from mlx_serving.cli.serve import Stamped


def serve(*args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("MLX_SERVING_")}
    command = [sys.executable, "-m", "mlx_serving", "serve", *args]
    return subprocess.run(
        command, env={**env, **variables}, capture_output=True, text=True, timeout=120, check=False
    )


def events(job: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in job.stdout.splitlines()]


@pytest.fixture
def kolkata(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "IST-5:30")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("kolkata")
def test_the_log_says_its_offset_from_utc() -> None:
    record = logging.makeLogRecord({"created": 1e9, "msg": "x"})
    line = Stamped("%(asctime)s: %(message)s").format(record)
    assert line == "2001-09-09 07:16:40.000+05:30: x"


def test_a_port_in_use_is_one_line_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        job = serve("--json", MLX_SERVING_PORT=str(port))
    assert job.returncode == Exit.CANNOT_BIND
    [error] = events(job)
    assert error["code"] == "address_unavailable"
    assert str(port) in error["message"]
    assert "--port" in error["remedy"]


@pytest.mark.parametrize("uds", ["/nonexistent/folder/x.sock", "/" + "x" * 200])
def test_a_socket_path_that_cannot_be(uds: str) -> None:
    job = serve("--uds", uds)
    assert job.returncode == Exit.CANNOT_BIND
    assert job.stderr.startswith("error: ") and "Traceback" not in job.stderr
    assert "stop what listens there" not in job.stderr


def test_a_model_that_does_not_exist_ends_the_server(tmp_path: Path) -> None:
    job = serve(str(tmp_path / "nothing"), "--json", "--port", "0", MLX_SERVING_HOME=str(tmp_path))
    assert job.returncode == Exit.NO_MODEL, job.stderr
    listening, error = events(job)
    assert listening["event"] == "listening"
    assert listening["url"].startswith("http://127.0.0.1:")
    assert error["code"] == "model_not_found"
    assert "Traceback" not in job.stderr


def test_a_wrong_variable_and_a_wrong_file_are_told_together(tmp_path: Path) -> None:
    (tmp_path / "serve.yaml").write_text("prot: 1\n")
    job = serve("--config", str(tmp_path / "serve.yaml"), MLX_SERVING_PORT="abc")
    assert job.returncode == Exit.USAGE
    assert job.stderr.splitlines() == [
        f"error: {tmp_path}/serve.yaml:1: unknown key 'prot' (did you mean 'port'?)",
        "error: MLX_SERVING_PORT: expected int, got 'abc'",
    ]
