"""The flags of `mlx-serving canary` and `mlx-serving ab`; the work is in `rollouts`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mlx_serving.cli.admin import Server

canary_app = typer.Typer(no_args_is_help=True)
ab_app = typer.Typer(no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="The rollout's name.")]
_LATER = {"Server": Any}
"""Annotations whose module is not imported for `--help`'s sake."""


@canary_app.callback()
def canary() -> None:
    """Have a variant take a growing share of a model's traffic; it gives it back when it is worse."""


@ab_app.callback()
def ab() -> None:
    """Split a model's traffic between it and a variant, or copy it, and compare."""


def _where(
    url: Annotated[str, typer.Option("--url", help="The server.")] = "http://127.0.0.1:8000",
    uds: Annotated[
        str | None, typer.Option("--uds", help="The server's Unix domain socket.")
    ] = None,
    admin_key: Annotated[
        str | None, typer.Option("--admin-key", help="Default: MLX_SERVING_ADMIN_KEY.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> Server:
    from mlx_serving.cli.admin import Server
    from mlx_serving.cli.say import Say

    return Server(url, uds, admin_key, Say(json))


def of_a_server(command: Callable[..., int]) -> Callable[..., None]:
    """A typer command of one whose first parameter is the server: with the flags that find it."""
    own = list(inspect.signature(command, eval_str=True, locals=_LATER).parameters.values())[1:]
    where = inspect.signature(_where, eval_str=True, locals=_LATER).parameters

    @functools.wraps(command)
    def run(**values: Any) -> None:
        server = _where(**{name: values.pop(name) for name in where})
        raise typer.Exit(command(server, **values))

    parameters = [*own, *where.values()]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


@canary_app.command("start")
@of_a_server
def canary_start(
    server: Server,
    model: Annotated[str, typer.Argument(help="The served model whose traffic it is.")],
    variant: Annotated[str, typer.Argument(help="The served model that takes a share.")],
    name: Annotated[str, typer.Option("--name", help="What to call it.")] = "canary",
    stages: Annotated[
        str, typer.Option("--stages", help="The variant's shares, in percent.")
    ] = "10,25,50,100",
    min_samples: Annotated[
        int, typer.Option("--min-samples", min=1, help="Requests each side answers in a stage.")
    ] = 300,
    min_s: Annotated[
        float, typer.Option("--min-s", min=0, help="Least length of a stage, in seconds.")
    ] = 60.0,
) -> int:
    """Start a canary."""
    from mlx_serving.cli import rollouts as command

    try:
        shares = [float(part) / 100 for part in stages.split(",")]
    except ValueError:
        raise typer.BadParameter("percentages, as 10,25,50,100", param_hint="--stages") from None
    steps = [{"share": s, "min_samples": min_samples, "min_s": min_s} for s in shares]
    spec = {"name": name, "model": model, "variant": variant, "stages": steps}
    return command.start(server, spec)


@ab_app.command("start")
@of_a_server
def ab_start(
    server: Server,
    model: Annotated[str, typer.Argument(help="The served model whose traffic it is.")],
    variant: Annotated[str, typer.Argument(help="The served model to compare it with.")],
    name: Annotated[str, typer.Option("--name", help="What to call it.")] = "ab",
    share: Annotated[
        float, typer.Option("--share", min=0.1, max=100, help="The variant's, in percent.")
    ] = 50.0,
    shadow: Annotated[
        bool, typer.Option("--shadow", help="Copy the share instead; its answers go nowhere.")
    ] = False,
) -> int:
    """Start an A/B test, or a shadow."""
    from mlx_serving.cli import rollouts as command

    mode = "shadow" if shadow else "ab"
    stages = [{"share": share / 100, "min_samples": 1, "min_s": 0}]
    spec = {"name": name, "model": model, "variant": variant, "mode": mode, "stages": stages}
    return command.start(server, spec)


@canary_app.command("status")
@ab_app.command("status")
@of_a_server
def rollout_status(
    server: Server,
    name: Annotated[str | None, typer.Argument(help="One of them, with its figures.")] = None,
) -> int:
    """Show every rollout, or one with its figures."""
    from mlx_serving.cli import rollouts as command

    return command.status(server, name)


@canary_app.command("promote")
@of_a_server
def canary_promote(server: Server, name: Name) -> int:
    """The variant answers everything from here on."""
    from mlx_serving.cli import rollouts as command

    return command.act(server, name, "promote")


@canary_app.command("rollback")
@of_a_server
def canary_rollback(server: Server, name: Name) -> int:
    """The model answers everything from here on; what runs goes on where it is."""
    from mlx_serving.cli import rollouts as command

    return command.act(server, name, "rollback")


@canary_app.command("remove")
@ab_app.command("stop")
@of_a_server
def rollout_remove(server: Server, name: Name) -> int:
    """Forget a rollout; the model answers for itself."""
    from mlx_serving.cli import rollouts as command

    return command.remove(server, name)


@ab_app.command("report")
@of_a_server
def ab_report(
    server: Server,
    name: Name,
    plot: Annotated[bool, typer.Option("--plot", help="Draw the differences.")] = False,
) -> int:
    """Compare the two sides of a rollout, metric by metric."""
    from mlx_serving.cli import rollouts as command

    return command.plot(server, name) if plot else command.status(server, name)
