"""The flags of `mlx-serving canary` and `mlx-serving ab`; the work is in `rollouts`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mlx_serving.cli.rollouts import Server

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
canary_app = typer.Typer(no_args_is_help=True)
ab_app = typer.Typer(no_args_is_help=True)
Url = Annotated[str, typer.Option("--url", help="The server.")]
Uds = Annotated[str | None, typer.Option("--uds", help="The server's Unix domain socket.")]
AdminKey = Annotated[
    str | None, typer.Option("--admin-key", help="Default: MLX_SERVING_ADMIN_KEY.")
]
Name = Annotated[str, typer.Argument(help="The rollout's name.")]
MaybeName = Annotated[str | None, typer.Argument(help="One of them, with its figures.")]
_HERE = "http://127.0.0.1:8000"


@canary_app.callback()
def canary() -> None:
    """Have a variant take a growing share of a model's traffic; it gives it back when it is worse."""


@ab_app.callback()
def ab() -> None:
    """Split a model's traffic between it and a variant, or copy it, and compare."""


@canary_app.command("start")
def canary_start(
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
    url: Url = _HERE,
    uds: Uds = None,
    admin_key: AdminKey = None,
    json: Json = False,
) -> None:
    """Start a canary."""
    from mlx_serving.cli import rollouts as command

    try:
        shares = [float(part) / 100 for part in stages.split(",")]
    except ValueError:
        raise typer.BadParameter("percentages, as 10,25,50,100", param_hint="--stages") from None
    steps = [{"share": s, "min_samples": min_samples, "min_s": min_s} for s in shares]
    spec = {"name": name, "model": model, "variant": variant, "stages": steps}
    raise typer.Exit(command.start(_server(url, uds, admin_key, json), spec))


@ab_app.command("start")
def ab_start(
    model: Annotated[str, typer.Argument(help="The served model whose traffic it is.")],
    variant: Annotated[str, typer.Argument(help="The served model to compare it with.")],
    name: Annotated[str, typer.Option("--name", help="What to call it.")] = "ab",
    share: Annotated[
        float, typer.Option("--share", min=0.1, max=100, help="The variant's, in percent.")
    ] = 50.0,
    shadow: Annotated[
        bool, typer.Option("--shadow", help="Copy the share instead; its answers go nowhere.")
    ] = False,
    url: Url = _HERE,
    uds: Uds = None,
    admin_key: AdminKey = None,
    json: Json = False,
) -> None:
    """Start an A/B test, or a shadow."""
    from mlx_serving.cli import rollouts as command

    mode = "shadow" if shadow else "ab"
    spec = {"name": name, "model": model, "variant": variant, "mode": mode}
    stages = [{"share": share / 100, "min_samples": 1, "min_s": 0}]
    raise typer.Exit(command.start(_server(url, uds, admin_key, json), {**spec, "stages": stages}))


@canary_app.command("status")
@ab_app.command("status")
def rollout_status(
    name: MaybeName = None,
    url: Url = _HERE,
    uds: Uds = None,
    admin_key: AdminKey = None,
    json: Json = False,
) -> None:
    """Show every rollout, or one with its figures."""
    from mlx_serving.cli import rollouts as command

    raise typer.Exit(command.status(_server(url, uds, admin_key, json), name))


@canary_app.command("promote")
def canary_promote(
    name: Name,
    url: Url = _HERE,
    uds: Uds = None,
    admin_key: AdminKey = None,
    json: Json = False,
) -> None:
    """The variant answers everything from here on."""
    from mlx_serving.cli import rollouts as command

    raise typer.Exit(command.act(_server(url, uds, admin_key, json), name, "promote"))


@canary_app.command("rollback")
def canary_rollback(
    name: Name,
    url: Url = _HERE,
    uds: Uds = None,
    admin_key: AdminKey = None,
    json: Json = False,
) -> None:
    """The model answers everything from here on; what runs goes on where it is."""
    from mlx_serving.cli import rollouts as command

    raise typer.Exit(command.act(_server(url, uds, admin_key, json), name, "rollback"))


@canary_app.command("remove")
@ab_app.command("stop")
def rollout_remove(
    name: Name,
    url: Url = _HERE,
    uds: Uds = None,
    admin_key: AdminKey = None,
    json: Json = False,
) -> None:
    """Forget a rollout; the model answers for itself."""
    from mlx_serving.cli import rollouts as command

    raise typer.Exit(command.remove(_server(url, uds, admin_key, json), name))


@ab_app.command("report")
def ab_report(
    name: Name,
    plot: Annotated[bool, typer.Option("--plot", help="Draw the differences.")] = False,
    png: Annotated[
        str | None, typer.Option("--png", metavar="FILE", help="Draw them to a PNG file.")
    ] = None,
    url: Url = _HERE,
    uds: Uds = None,
    admin_key: AdminKey = None,
    json: Json = False,
) -> None:
    """Compare the two sides of a rollout, metric by metric."""
    from mlx_serving.cli import rollouts as command

    server = _server(url, uds, admin_key, json)
    code = command.plot(server, name, png) if plot or png else command.status(server, name)
    raise typer.Exit(code)


def _server(url: str, uds: str | None, admin_key: str | None, json: bool) -> Server:
    from mlx_serving.cli.rollouts import Server
    from mlx_serving.cli.say import Say

    return Server(url, uds, admin_key, Say(json))
