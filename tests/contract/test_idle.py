"""A server that has nothing to do uses no CPU: neither the gateway nor the worker and its kernels' threads."""

from __future__ import annotations

import json
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

import byte_vocabulary
from contract import served
from model import zoo

pytestmark = [pytest.mark.slow, pytest.mark.model]

EOS = zoo.VOCAB - 1
WINDOW_S = 1.0
WINDOWS = 30
IDLE_SHARE = 0.03
"""Of one core. Heartbeats and metrics take a fraction of it, one spinning thread all that it can get."""


def cpu_s(processes: list[psutil.Process]) -> float:
    return sum(sum(p.cpu_times()[:2]) for p in processes)


def test_an_idle_server_uses_no_cpu(tmp_path: Path) -> None:
    zoo.write("llama", tmp_path, eos_token_id=EOS)
    byte_vocabulary.write(tmp_path, eos=EOS)
    with served.serving([tmp_path]) as url:
        body = json.dumps({"model": tmp_path.name, "prompt": "one", "max_tokens": 20}).encode()
        request = urllib.request.Request(
            f"{url}/v1/completions", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            assert json.load(answer)["choices"]
        with urllib.request.urlopen(f"{url}/health") as answer:
            (facts,) = json.load(answer)["workers"]
        worker = psutil.Process(facts["pid"])
        gateway = worker.parent()
        assert gateway is not None
        shares = []
        for _ in range(WINDOWS):  # what a load leaves to be done may take the first few
            before, began = cpu_s([gateway, worker]), time.monotonic()
            time.sleep(WINDOW_S)
            used = cpu_s([gateway, worker]) - before
            shares.append(used / (time.monotonic() - began))
            if shares[-1] <= IDLE_SHARE:
                return
    pytest.fail(f"shares of a core while idle: {shares}")
