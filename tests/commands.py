"""`mlx-serving …` without a Python started for each: what a shell would see of it.

That the command is a process is shown where it is one: unit/cli/test_main_command.py, and every
`serve`.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass

from mlx_serving.cli import main


@dataclass(frozen=True)
class Job:
    returncode: int
    stdout: str
    stderr: str


def run(*args: str) -> Job:
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(args)
        except SystemExit as end:
            assert end.code is None or isinstance(end.code, int)
            code = end.code or 0
    return Job(code, out.getvalue(), err.getvalue())
