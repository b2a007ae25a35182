"""`mlx-serving restart`: have a server on this machine replace its worker; its streams go on."""

from __future__ import annotations

import os
import signal
import subprocess

import httpx

from mlx_serving.cli.exits import Exit
from mlx_serving.cli.say import Say
from mlx_serving.cli.where import Where


def run(where: Where, say: Say | None = None) -> int:
    """Ask the server who it is, and send it SIGHUP."""
    say = say or Say()
    try:
        with where.client(timeout=5.0) as http:
            pid = http.get("/health").json()["pid"]
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        say.error("no_server", f"no server of ours answers at {where}: {error}")
        return Exit.FAILED
    # The server may be another machine's, or a container's, where its process id means nothing here.
    if not isinstance(pid, int) or not _is_ours(pid):
        reason = f"the server at {where} does not run on this machine, or not where it can be seen"
        say.error("not_here", reason, "send SIGHUP to its process where it runs")
        return Exit.FAILED
    try:
        os.kill(pid, signal.SIGHUP)
    except PermissionError:
        say.error("not_allowed", f"process {pid} belongs to somebody else")
        return Exit.FAILED
    say.event("restarting", f"process {pid} replaces its worker; {where}/health tells", pid=pid)
    return Exit.OK


def _is_ours(pid: int) -> bool:
    command = ["ps", "-p", str(pid), "-o", "args="]
    shown = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return "mlx-serving" in shown or "mlx_serving" in shown
