"""The typer application: help, completion, and every command but a plainly spelt `serve`."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_serving.cli.admin import Server, of_a_server
from mlx_serving.cli.canary import ab_app, canary_app
from mlx_serving.cli.feature import flag_app
from mlx_serving.cli.flags import documented, from_typer
from mlx_serving.cli.where import Uds, Url, where

app = typer.Typer(
    name="mlx-serving",
    help="Serve language models with MLX: an OpenAI-compatible server on this machine.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", envvar="MLX_SERVING_API_KEY", help="Where the server asks for one."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def serve(
    *,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE",
            help="A YAML file of settings, named as the flags are, with underscores.",
            rich_help_panel="Sources",
        ),
    ] = None,
    json: Annotated[
        bool,
        typer.Option(
            "--json", help="Say everything as one JSON object a line.", rich_help_panel="Sources"
        ),
    ] = False,
    **settings: Any,
) -> None:
    """Serve one or more models over HTTP.

    Every flag is also a variable (--max-num-seqs is MLX_SERVING_MAX_NUM_SEQS) and a key of the
    --config file (max_num_seqs); a flag wins over a variable, a variable over the file.
    """
    from mlx_serving.cli import serve as command

    args = from_typer(settings, str(config) if config else None, json)
    raise typer.Exit(command.run(args))


app.command()(documented(serve))


@app.command()
def chat(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Start an engine with this model; with --url or --uds, its name there."
        ),
    ] = None,
    url: Url = None,
    uds: Uds = None,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="Longest answer, in tokens.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", min=0.0, help="0 is greedy.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Same seed, same answers.")] = None,
    api_key: ApiKey = None,
) -> None:
    """Talk to a model: to a running server, or to an engine started here.

    Without --url or --uds and a MODEL, to the server that answers at their default, if one does. With text piped in, it answers that text once and ends.
    """
    from mlx_serving.cli import chat as command

    params = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    given = {name: value for name, value in params.items() if value is not None}
    server, named = where(url, uds), bool(url or uds)
    raise typer.Exit(
        command.run(model, server=server, named=named, system=system, params=given, api_key=api_key)
    )


@app.command()
def pull(
    name: Annotated[str, typer.Argument(help="Alias, hub id, or a .gguf file to convert.")],
    json: Json = False,
) -> None:
    """Fetch a model, and convert it if it needs that, without serving it."""
    from mlx_serving.cli import pull as command

    raise typer.Exit(command.run(name, json=json))


@app.command()
def list(json: Json = False) -> None:
    """List every model on this machine: the hub's cache, converted folders, aliases."""
    from mlx_serving.cli import list as command

    raise typer.Exit(command.run(json=json))


@app.command()
def show(
    model: Annotated[str, typer.Argument(help="Alias, hub id, folder or .gguf file.")],
    json: Json = False,
) -> None:
    """Show all that is known of a model on this machine."""
    from mlx_serving.cli import show as command

    raise typer.Exit(command.run(model, json=json))


@app.command()
def health(
    model: Annotated[
        str | None, typer.Argument(help="Alias, hub id, folder or .gguf file; default: all.")
    ] = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Read every file again and compare its hash.")
    ] = False,
    json: Json = False,
) -> None:
    """Say which models have broken files, and which this installation cannot run.

    Exits with 0 if all is well, 6 for broken files, 7 for what cannot run here.
    """
    from mlx_serving.cli import health as command

    raise typer.Exit(command.run(model, deep=deep, json=json))


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="Alias, hub id, folder or .gguf file.")],
    bits: Annotated[int | None, typer.Option("--bits", help="2, 3, 4, 5, 6 or 8.")] = None,
    group_size: Annotated[
        int | None, typer.Option("--group-size", help="Weights that share a scale: 32, 64 or 128.")
    ] = None,
    mode: Annotated[
        str | None, typer.Option("--mode", help="affine (default), mxfp4, nvfp4 or mxfp8.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", help="mixed_2_6, mixed_3_4, mixed_3_6 or mixed_4_6."),
    ] = None,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="To floats; with --bits, then to those.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Of floats: float32, float16 or bfloat16.")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Of the result; default: the model's, and how.")
    ] = None,
    json: Json = False,
) -> None:
    """Quantise, dequantise or cast a model into a new one, which `serve` takes by its name."""
    from mlx_serving.catalog.conversion import Wish
    from mlx_serving.cli import convert as command

    wish = Wish(
        bits=bits,
        group_size=group_size,
        mode=mode,
        recipe=recipe,
        dequantize=dequantize,
        dtype=dtype,
    )
    raise typer.Exit(command.run(model, wish, name=name, json=json))


@app.command()
def repair(
    model: Annotated[str, typer.Argument(help="Alias, hub id, folder or .gguf file.")],
    json: Json = False,
) -> None:
    """Fetch or make again what is broken of a model's files, and nothing else."""
    from mlx_serving.cli import repair as command

    raise typer.Exit(command.run(model, json=json))


@app.command()
def rm(
    models: Annotated[builtins.list[str], typer.Argument(help="Aliases, hub ids, names.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: Json = False,
) -> None:
    """Remove models from this machine; not while a server uses them."""
    from mlx_serving.cli import rm as command

    raise typer.Exit(command.run(models, yes=yes, json=json))


@app.command()
def ps(
    url: Url = None,
    uds: Uds = None,
    api_key: ApiKey = None,
    json: Json = False,
) -> None:
    """Show what a running server has loaded: models, their sizes, running rows, workers."""
    from mlx_serving.cli import ps as command

    raise typer.Exit(command.run(where(url, uds), json=json, api_key=api_key))


@app.command()
def doctor(json: Json = False) -> None:
    """Say whether this machine can serve, and how fast its arithmetic is.

    Exits with 0 if it can and 3 if it cannot.
    """
    from mlx_serving.cli import doctor as command

    raise typer.Exit(command.run(json=json))


@app.command()
def restart(
    url: Url = None,
    uds: Uds = None,
    json: Json = False,
) -> None:
    """Have a running server on this machine replace its worker; no stream is dropped."""
    from mlx_serving.cli import restart as command
    from mlx_serving.cli.say import Say

    raise typer.Exit(command.run(where(url, uds), Say(json)))


@app.command()
@of_a_server
def reload(server: Server) -> int:
    """Have a running server read its settings anew, and say what changed and what needs a restart."""
    from mlx_serving.cli import reload as command

    return command.run(server)


keys_app = typer.Typer(no_args_is_help=True)


@keys_app.callback()
def keys() -> None:
    """Make API keys."""


@keys_app.command("new")
def keys_new(
    name: Annotated[str, typer.Option("--name", help="The key's name in the entry.")] = "somebody",
    json: Json = False,
) -> None:
    """Print an API key, its hash, and an entry for the file of API keys."""
    import sys

    from mlx_serving.cli import keys as command
    from mlx_serving.cli.say import Say

    # The key is the output, so that it can be piped.
    raise typer.Exit(command.new(name, Say(json, err=sys.stdout)))


app.add_typer(keys_app, name="keys")
app.add_typer(canary_app, name="canary")
app.add_typer(ab_app, name="ab")
app.add_typer(flag_app, name="flag")


@app.command()
def version() -> None:
    """Print the version."""
    from mlx_serving import __version__

    print(__version__)
