"""`mlx-serving pull`: fetch a model now, serve it later."""

from __future__ import annotations

from mlx_serving import config as settings
from mlx_serving.cli.exits import Exit
from mlx_serving.cli.say import Say
from mlx_serving.errors import ConfigError, MLXServingError


def run(name: str, json: bool = False, say: Say | None = None) -> int:
    """Fetch and convert `name`; say where it went."""
    say = say or Say(json)
    try:
        config = settings.load()
    except ConfigError as error:
        say.config_error(error)
        return Exit.USAGE
    from mlx_serving.catalog.ensure import ensure

    try:
        folder = ensure(name, config, say.progress())
    except MLXServingError as error:
        say.error(error.code, error.message)
        return Exit.NO_MODEL
    except KeyboardInterrupt:
        say.error("interrupted", "stopped; the next pull goes on from here")
        return Exit.INTERRUPTED
    if json:
        say.event("pulled", "", name=name, path=str(folder.path))
    else:
        print(folder.path)
    return Exit.OK
