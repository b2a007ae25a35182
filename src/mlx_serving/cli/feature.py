"""The flags of `mlx-serving flag`; the work is in `feature_flags`."""

from __future__ import annotations

from typing import Annotated

import typer

from mlx_serving.cli.admin import Server, of_a_server

flag_app = typer.Typer(no_args_is_help=True)


@flag_app.callback()
def flag() -> None:
    """Look at a running server's feature flags, and change whom they reach."""


@flag_app.command("list")
@of_a_server
def flag_list(server: Server) -> int:
    """Show every feature flag with its share."""
    from mlx_serving.cli import feature_flags as command

    return command.show(server)


@flag_app.command("set")
@of_a_server
def flag_set(
    server: Server,
    name: Annotated[str, typer.Argument(help="The flag's name.")],
    percent: Annotated[float, typer.Argument(min=0, max=100, help="Of the requests.")],
) -> int:
    """Have a flag reach another share; who was in it stays in it where that grows. Until a restart."""
    from mlx_serving.cli import feature_flags as command

    return command.set_percent(server, name, percent)
