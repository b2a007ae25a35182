"""A real server over a scripted model, and what it wrote."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

KEY, ADMIN = "sk-the-secret-key-of-a-client", "sk-the-secret-key-of-an-admin"


@dataclass
class Server:
    url: str
    process: subprocess.Popen[str]
    log: Path
    key: str = KEY
    admin: str = ADMIN

    def client(self, key: str | None = KEY) -> httpx.Client:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=120)

    def logged(self) -> str:
        return self.log.read_text()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


@contextmanager
def serving(model: Path, folder: Path, *flags: str, **env: str) -> Iterator[Server]:
    log = folder / "server.log"
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MLX_SERVING_")}
    command = [sys.executable, "-m", "mlx_serving", "serve", str(model), "--json", "--port", "0"]
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [*command, *flags], stdout=subprocess.PIPE, stderr=stderr, text=True, env=clean | env
        )
    try:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        while json.loads(process.stdout.readline())["event"] != "model_loaded":
            pass
        yield Server(url, process, log)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def server(
    scripted_once: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """With a key, and with everything logged that can be."""
    model = scripted_once(text="An answer with <|im_end|> and words.", context=4096)
    env = {"MLX_SERVING_API_KEY": KEY, "MLX_SERVING_ADMIN_KEY": ADMIN}
    folder = tmp_path_factory.mktemp("server")
    with serving(model, folder, "--log-level", "debug", **env) as server:
        yield server
