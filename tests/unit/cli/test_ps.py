"""`ps` against what a server answers."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from mlx_serving.cli import ps
from mlx_serving.cli.exits import Exit
from mlx_serving.cli.where import where

HEALTH: dict[str, Any] = {
    "status": "degraded",
    "reasons": ["broken"],
    "pid": 7,
    "open_requests": 3,
    "workers": [{"pid": 8, "state": "ready", "cause": None, "restarts": 1}],
    "models": [
        {"id": "one", "status": "ready", "reason": None},
        {"id": "two", "status": "failed", "reason": "broken"},
    ],
}
METRICS = """\
# HELP mlx_serving_running_sequences x
mlx_serving_running_sequences{model="one"} 2.0
mlx_serving_waiting_sequences{model="one"} 1.0
"""


def answer(request: httpx.Request) -> httpx.Response:
    match request.url.path:
        case "/health":
            return httpx.Response(200, json=HEALTH)
        case "/metrics":
            return httpx.Response(200, text=METRICS)
        case "/api/ps":
            one = {"name": "one:latest", "size_vram": 1_500_000, "context_length": 512}
            return httpx.Response(200, json={"models": [one]})
        case _:
            return httpx.Response(404)


def test_models_sizes_rows_and_workers(capsys: pytest.CaptureFixture[str]) -> None:
    with httpx.Client(transport=httpx.MockTransport(answer), base_url="http://x") as http:
        report = ps.ask(http)
    one, two = report["models"]
    assert (one["weight_bytes"], one["running"], one["waiting"]) == (1_500_000, 2, 1)
    assert (two["weight_bytes"], two["running"], two["reason"]) == (None, 0, "broken")
    ps._print(report)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["one", "ready", "1.5", "MB", "512", "2", "1"]
    assert lines[-2:] == [
        "server 7: degraded, 3 open requests",
        "worker 8: ready, restarted 1 times",
    ]


def test_nobody_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert ps.run(where("http://127.0.0.1:9")) == Exit.FAILED
    assert "no server of ours answers at http://127.0.0.1:9" in capsys.readouterr().err
