"""The flags of `mlx-serving canary` and `mlx-serving ab`; the work is in `rollouts`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlx_serving.cli.admin import Server, of_a_server

canary_app = typer.Typer(no_args_is_help=True)
ab_app = typer.Typer(no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="The rollout's name.")]
Metrics = Annotated[
    str | None,
    typer.Option(
        "--metrics", help="What counts, as error,tpot; default: all but logprob and score."
    ),
]


@canary_app.callback()
def canary() -> None:
    """Have a variant take a growing share of a model's traffic; it gives it back when it is worse."""


@ab_app.callback()
def ab() -> None:
    """Split a model's traffic between it and a variant, or copy it, and compare."""


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
    metrics: Metrics = None,
) -> int:
    """Start a canary."""
    from mlx_serving.cli import rollouts as command

    try:
        shares = [float(part) / 100 for part in stages.split(",")]
    except ValueError:
        raise typer.BadParameter("percentages, as 10,25,50,100", param_hint="--stages") from None
    steps = [{"share": s, "min_samples": min_samples, "min_s": min_s} for s in shares]
    spec = {"name": name, "model": model, "variant": variant, "stages": steps}
    return command.start(server, spec | _counted(metrics))


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
    metrics: Metrics = None,
) -> int:
    """Start an A/B test, or a shadow."""
    from mlx_serving.cli import rollouts as command

    mode = "shadow" if shadow else "ab"
    stages = [{"share": share / 100, "min_samples": 1, "min_s": 0}]
    spec = {"name": name, "model": model, "variant": variant, "mode": mode, "stages": stages}
    return command.start(server, spec | _counted(metrics))


def _counted(metrics: str | None) -> dict[str, list[str]]:
    return {} if metrics is None else {"metrics": metrics.split(",")}


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
    png: Annotated[
        Path | None, typer.Option("--png", help="Draw them into this file (the extra 'plot').")
    ] = None,
) -> int:
    """Compare the two sides of a rollout, metric by metric."""
    from mlx_serving.cli import rollouts as command

    if plot or png is not None:
        return command.plot(server, name, png)
    return command.status(server, name)
