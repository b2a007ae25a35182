"""What loads and requests take of memory they give back."""

from __future__ import annotations

import asyncio
import json
import re
import urllib.request
from pathlib import Path

import pytest

import byte_vocabulary
from contract import soak
from model import zoo

pytestmark = pytest.mark.model

EOS = zoo.VOCAB - 1
FLAT = 1.05
WARM_UP, CYCLES, REQUESTS = 50, 200, 2_000
"""A cycle: some requests, then the model leaves memory and comes back."""


class Served:
    def __init__(self, server: soak.Server) -> None:
        self._server = server
        self._url = "http://{}:{}".format(*server.address)
        with urllib.request.urlopen(f"{self._url}/v1/models") as answer:
            self._model = json.load(answer)["data"][0]["id"]

    def cycle(self, requests: int) -> None:
        bodies = [{"prompt": f"p{i}", "max_tokens": 8, "seed": i} for i in range(requests)]
        answers = asyncio.run(
            soak.all_at_once(self._server.address, [soak.request(body) for body in bodies])
        )
        assert [status for status, _ in answers] == [200] * requests
        for action in ("unload", "load"):
            path = f"{self._url}/v1/models/{self._model}/{action}"
            with urllib.request.urlopen(urllib.request.Request(path, method="POST")) as answer:
                assert answer.status == 200

    def holdings(self) -> dict[str, float]:
        """Bytes, with the model loaded and nothing asked of it."""
        with urllib.request.urlopen(f"{self._url}/metrics") as answer:
            text = answer.read().decode()
        active = re.search(r'^mlx_serving_memory_bytes{kind="active"} (\S+)', text, re.MULTILINE)
        assert active is not None
        held = self._server.holdings()
        return {
            "gateway": held.gateway_bytes,
            "worker": held.worker_bytes,
            "MLX's": float(active[1]),
        }


@pytest.mark.slow
def test_memory_is_where_it_was_after_two_hundred_loads(tmp_path: Path) -> None:
    zoo.write("llama", tmp_path, eos_token_id=EOS)
    byte_vocabulary.write(tmp_path, eos=EOS)
    with soak.serving(tmp_path, tmp_path) as server:
        served = Served(server)
        for _ in range(WARM_UP):
            served.cycle(REQUESTS // CYCLES)
        before = served.holdings()
        for _ in range(CYCLES):
            served.cycle(REQUESTS // CYCLES)
        after = served.holdings()
    print(before, after)
    for name, was in before.items():
        assert after[name] <= was * FLAT, (name, before, after)
