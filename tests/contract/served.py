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
def serving(
    models: Sequence[Path], *flags: str, loaded: int | None = None, under: Sequence[str] = ()
) -> Iterator[str]:
    """Its URL, once `loaded` models are there: all of them unless told otherwise. It stops cleanly, or
    the block fails. `under`: a command that runs the rest of its line."""
    command = [*under, sys.executable, "-m", "mlx_serving", "serve", *map(str, models), "--json"]
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
        for _ in models[:loaded]:
            assert json.loads(server.stdout.readline())["event"] == "model_loaded"
        yield address
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
