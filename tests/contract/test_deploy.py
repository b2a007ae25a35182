"""The files in deploy/: what they say of the command is true of it, and a manager is told the truth."""

from __future__ import annotations

import configparser
import json
import os
import plistlib
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from mlx_serving.cli.exits import Exit
from mlx_serving.cli.flags import parse_plain
from mlx_serving.config import Config

DEPLOY = Path(__file__).parents[2] / "deploy"


def unit() -> configparser.SectionProxy:
    class Unit(configparser.ConfigParser):
        def optionxform(self, optionstr: str) -> str:
            return optionstr

    parser = Unit(interpolation=None, strict=False, delimiters=("=",))
    parser.read(DEPLOY / "mlx-serving.service")
    return parser["Service"]


def test_every_command_line_is_one_of_ours() -> None:
    plist = plistlib.loads((DEPLOY / "org.mlx-serving.plist").read_bytes())
    container = (DEPLOY / "Containerfile").read_text()
    said = re.findall(r"^(?:ENTRYPOINT|CMD) (\[.*\])$", container, re.M)
    entry = [word for words in said for word in json.loads(words)]
    lines = [shlex.split(unit()["ExecStart"]), plist["ProgramArguments"], entry]
    assert len(lines) == 3
    for command, serve, *args in lines:
        assert Path(command).name == "mlx-serving" and serve == "serve"
        assert parse_plain(args) is not None, args


def test_the_unit_knows_the_server_s_ways() -> None:
    service = unit()
    assert service["Type"] == "notify"
    assert float(service["TimeoutStopSec"]) > Config().drain_timeout_s
    settled = {int(code) for code in service["RestartPreventExitStatus"].split()}
    assert settled == {Exit.USAGE, Exit.CANNOT_WORK}
    assert "-HUP" in service["ExecReload"]
    plist = plistlib.loads((DEPLOY / "org.mlx-serving.plist").read_bytes())
    assert plist["ExitTimeOut"] > Config().drain_timeout_s


def test_a_manager_is_told_of_start_life_and_end(
    scripted: Callable[..., Path], tmp_path_factory
) -> None:
    path = str(tmp_path_factory.mktemp("n") / "s")
    env = {k: v for k, v in os.environ.items() if not k.startswith("MLX_SERVING_")}
    env |= {"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "100000"}
    command = [sys.executable, "-m", "mlx_serving", "serve", str(scripted(text="x")), "--port", "0"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path)
        manager.settimeout(120)
        server = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
        try:
            said = [manager.recv(4096).decode()]
            assert said[0].startswith("READY=1\n")
            while "STATUS=scripted is ready" not in said or said.count("WATCHDOG=1") < 3:
                said.append(manager.recv(4096).decode())
            server.send_signal(signal.SIGTERM)
            while not said[-1].startswith("STOPPING=1\n"):
                said.append(manager.recv(4096).decode())
            assert server.wait(30) == 0
        finally:
            server.kill()
            server.wait()
