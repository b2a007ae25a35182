from __future__ import annotations

import commands
from mlx_serving import __version__


def test_a_process_may_run_two_commands() -> None:
    """The first one loads all commands' modules, `list` among them."""
    assert commands.run("list", "--help").returncode == 0
    assert commands.run("--version").stdout.strip() == __version__
