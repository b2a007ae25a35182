"""`mlx-serving serve` as a process of its own, for the time of a block."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def serving(models: Sequence[Path], *flags: str) -> Iterator[str]:
    """Its URL, once every model is loaded. It stops cleanly, or the block fails."""
    command = [sys.executable, "-m", "mlx_serving", "serve", *map(str, models), "--json"]
    server = subprocess.Popen(
        [*command, "--port", "0", *flags],
        stdout=subprocess.PIPE,
        text=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("MLX_SERVING_")},
        start_new_session=True,
    )
    try:
        assert server.stdout is not None
        address = json.loads(server.stdout.readline())["url"]
        for _ in models:
            assert json.loads(server.stdout.readline())["event"] == "model_loaded"
        yield address
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
