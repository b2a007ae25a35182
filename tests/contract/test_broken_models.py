"""A model folder broken in each way, as its user meets it: `list`, `health`, /v1/models, a request."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from mlx_serving.cli.exits import Exit
from model_folders import DAMAGES, WEIGHTS, files, write_folder

NAMES = {damage: damage.replace(" ", "-").lower() for damage in DAMAGES}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder broken in each way, whose weights' hashes had been told and read before."""
    home = tmp_path_factory.mktemp("home")
    contents = files()
    told = {"job": ["mlx", "x"], "sha256": {WEIGHTS: hashlib.sha256(contents[WEIGHTS]).hexdigest()}}
    contents["mlx_serving_manifest.json"] = json.dumps(told).encode()
    for name in NAMES.values():
        write_folder(home / "models" / name, contents)
    assert command(home, "health").returncode == Exit.OK
    for damage, name in NAMES.items():
        DAMAGES[damage][0](home / "models" / name)
    return home


def environment(home: Path) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MLX_SERVING_", "HF_"))}
    return env | {"MLX_SERVING_HOME": str(home), "HF_HOME": str(home / "hf")}


def command(home: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mlx_serving", *args],
        env=environment(home),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def server(home: Path, scripted_once: Any) -> Iterator[httpx.Client]:
    """One server with a good model and all the broken ones, once it has tried them."""
    models = [str(scripted_once("good", text="Fine.")), *NAMES.values()]
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_serving", "serve", *models, "--json", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment(home),
    )
    assert process.stdout is not None
    url = json.loads(process.stdout.readline())["url"]
    with httpx.Client(base_url=url, timeout=120) as http:
        until_s = time.monotonic() + 120
        waiting = {"absent", "fetching", "loading"}
        while any(m["status"] in waiting for m in http.get("/v1/models").json()["data"]):
            assert time.monotonic() < until_s
            time.sleep(0.05)
        yield http
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)


def test_list_and_health_say_the_cause(home: Path) -> None:
    listed = command(home, "list", "--json")
    examined = command(home, "health", "--json")
    assert (listed.returncode, examined.returncode) == (Exit.OK, Exit.FILES_BROKEN)
    for output in (listed, examined):
        found = {model["name"]: model for model in json.loads(output.stdout)["models"]}
        for damage, (_, code, named, how) in DAMAGES.items():
            model = found[NAMES[damage]]
            unable = code == "unsupported_architecture"
            assert model["status"] == ("cannot_run" if unable else "broken"), damage
            assert named in model["reason"] and how in model["reason"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_server_lists_it_and_a_request_gets_the_cause(
    server: httpx.Client, damage: str
) -> None:
    _, code, named, how = DAMAGES[damage]
    listed = {model["id"]: model for model in server.get("/v1/models").json()["data"]}
    model = listed[NAMES[damage]]
    assert (model["status"], model["cause"]) == ("failed", code)
    assert named in model["reason"] and how in model["reason"]
    body = {"model": NAMES[damage], "prompt": "x", "max_tokens": 1}
    response = server.post("/v1/completions", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (503, code)
    assert named in error["message"] and how in error["message"]


def test_the_good_model_goes_on(server: httpx.Client) -> None:
    usable = server.get("/v1/models?usable=true").json()["data"]
    assert [model["id"] for model in usable] == ["good"]
    body = {"model": "good", "prompt": "x", "max_tokens": 5}
    assert server.post("/v1/completions", json=body).json()["choices"][0]["text"] == "Fine."
    assert server.get("/health").json()["status"] == "degraded"
