"""The worker process: `python -m mlx_serving.runtime.main --fd N`.

N is its end of a Unix socket pair. Only the parent ends it: it ignores SIGINT and SIGTERM, and
leaves on Shutdown or when the socket closes, whatever it is computing. Standard output and
error are for logs and last words.
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path

from mlx_serving.runtime.backend.model import LoadedModel, OnPhase
from mlx_serving.runtime.collector import Collector, NoCollector
from mlx_serving.runtime.link import Link
from mlx_serving.runtime.loads import Loader
from mlx_serving.runtime.loop import Loop
from mlx_serving.runtime.slices import Slices
from mlx_serving.worker import wire

LEAVE_GRACE_S = 1.0
"""How long a loop that is loading or computing may take to notice that the parent has gone."""


def load(
    model_id: str, path: Path, options: wire.ModelOptions, on_phase: OnPhase
) -> Slices[LoadedModel]:
    """`backend.loader.loading`, imported when first needed: MLX takes long to import."""
    from mlx_serving.runtime.backend import loader

    return (yield from loader.loading(model_id, path, options, on_phase))


def main(load: Loader = load) -> None:
    """`load` is a test's way to run this process without a backend."""
    parser = argparse.ArgumentParser(prog="mlx_serving.runtime.main")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--log-level", default="warning")
    args = parser.parse_args()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # the watchdog's question
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(
        level=args.log_level.upper(),
        stream=sys.stderr,
        format="%(levelname)s %(name)s: %(message)s",
    )
    sock = socket.socket(fileno=args.fd)
    sock.set_inheritable(False)
    threading.Thread(target=_leave_with_parent, args=(sock,), daemon=True).start()
    status = 0
    try:
        serve(sock, load, Collector())
    except BaseException:
        traceback.print_exc()
        status = 1
    # Nothing is worth waiting for: not the device's queue, not the libraries' exit hooks.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def serve(sock: socket.socket, load: Loader = load, collector: Collector | None = None) -> None:
    """Run the loop on this thread until the parent leaves; `worker.inprocess` calls it too."""
    with sock:
        Loop(Link(sock), load, collector=collector or NoCollector()).run()


def _leave_with_parent(sock: socket.socket) -> None:
    """The loop sees the end of its socket between two steps; a load or a stuck step does not."""
    gone = select.POLLHUP | select.POLLERR | select.POLLNVAL
    hung_up = select.poll()
    hung_up.register(sock, select.POLLHUP)
    # Darwin may also wake it for data that the loop has yet to read.
    while not any(event & gone for _, event in hung_up.poll()):
        time.sleep(0.1)
    time.sleep(LEAVE_GRACE_S)
    os._exit(0)


if __name__ == "__main__":
    main()
