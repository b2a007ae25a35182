"""Two canaries on one machine, for real: one is promoted, one rolls itself back.

    python examples/canary.py [MODEL]

The same weights are served three times: with float32 activations (`smollm2`), with int8 activations
(`smollm2-int8`), and so again with a fault that makes each step slow (`smollm2-int8-slow`). Two
clients ask for `smollm2` all the time; half of their requests go to the variant, until the figures
decide. Exit code 0: the first canary was promoted and the second one rolled back.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

CONFIG = """\
port: 0
rollouts_file: rollouts.json
models:
  - {{model: {model}, name: smollm2, kernels: f32, warm_up: [Hello]}}
  - {{model: {model}, name: smollm2-int8, kernels: fast, warm_up: [Hello]}}
  - {{model: {model}, name: smollm2-int8-slow, kernels: fast, warm_up: [Hello], slow_step_ms: 200}}
"""
TOPICS = "rain", "trains", "bread", "the sea", "a bridge", "chess", "winter", "a clock"
CLIENTS = 2
READY_S = 600
DECIDED_S = 900
"""Long enough for a very busy machine; a quiet one takes a minute for both canaries."""


def main(model: str) -> int:
    with tempfile.TemporaryDirectory() as folder, serving(model, Path(folder)) as url:
        first = canary(url, "int8", "smollm2-int8")
        mlx_serving(url, "canary", "remove", "int8")
        second = canary(url, "slow", "smollm2-int8-slow")
        with httpx.Client(base_url=url, timeout=300) as http:
            by = ask(http, 0).headers.get("x-mlx-variant", "itself")
        print(f"\nsmollm2 is answered by {by} again")
    return 0 if (first, second) == ("promoted", "rolled_back") else 1


@contextmanager
def serving(model: str, folder: Path) -> Iterator[str]:
    """A server of the three; its address, once all are ready."""
    file = folder / "serve.yaml"
    path = Path(model).absolute()
    file.write_text(CONFIG.format(model=path if path.exists() else model))
    print(f"$ cat serve.yaml\n{file.read_text()}\n$ mlx-serving serve --config serve.yaml")
    command = [sys.executable, "-m", "mlx_serving", "serve", "--config", file.name, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder) as server:
        try:
            assert server.stdout is not None
            url = str(json.loads(server.stdout.readline())["url"])
            until(lambda: httpx.get(f"{url}/ready", timeout=30).is_success, READY_S)
            for served in httpx.get(f"{url}/v1/models", timeout=30).json()["data"]:
                print(f"{served['id']} is {served['status']}")
            yield url
        finally:
            server.terminate()


def canary(url: str, name: str, variant: str) -> str:
    """Start one, keep two clients asking until it is decided, show it. Returns its status."""
    mlx_serving(
        url, "canary", "start", "smollm2", variant, "--name", name,
        "--stages", "50,100", "--min-samples", "30", "--min-s", "3",
    )  # fmt: skip

    def decided() -> bool:
        return rollout(url, name)["status"] != "running"

    done = threading.Event()
    numbers = itertools.count(1)
    clients = [
        threading.Thread(target=keep_asking, args=(url, numbers, done)) for _ in range(CLIENTS)
    ]
    for client in clients:
        client.start()
    try:
        until(decided, DECIDED_S)
    finally:
        done.set()
        for client in clients:
            client.join()
    print(f"\n({next(numbers) - 1} requests later)")
    mlx_serving(url, "canary", "status", name)
    return str(rollout(url, name)["status"])


def keep_asking(url: str, numbers: Iterator[int], done: threading.Event) -> None:
    with httpx.Client(base_url=url, timeout=300) as http:
        while not done.is_set():
            ask(http, next(numbers)).raise_for_status()


def ask(http: httpx.Client, number: int) -> httpx.Response:
    """Each is another user's, and another prompt."""
    prompt = f"{number} sentences about {TOPICS[number % len(TOPICS)]}:"
    body = {"model": "smollm2", "prompt": prompt, "max_tokens": 12, "temperature": 0}
    headers = {"x-session-id": f"user-{number}"}
    return http.post("/v1/completions", json=body | {"ignore_eos": True}, headers=headers)


def rollout(url: str, name: str) -> dict[str, object]:
    found: dict[str, object] = httpx.get(f"{url}/v1/rollouts/{name}", timeout=30).json()
    return found


def mlx_serving(url: str, *words: str) -> None:
    """A command as it would be typed, and what it prints."""
    print(f"\n$ mlx-serving {' '.join(words)}", flush=True)
    command = [sys.executable, "-m", "mlx_serving", *words, "--url", url]
    print(subprocess.run(command, check=True, capture_output=True, text=True).stdout, end="")


def until(condition: object, limit_s: float) -> None:
    """Wait until it is true. Raises TimeoutError."""
    assert callable(condition)
    end_s = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end_s:
            raise TimeoutError(f"not within {limit_s} s")
        time.sleep(0.25)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:] or ["smollm2-135m"]))
