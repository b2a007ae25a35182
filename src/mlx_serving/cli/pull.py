"""`mlx-serving pull`: fetch a model now, serve it later."""

from __future__ import annotations

from mlx_serving import config_sources as settings
from mlx_serving.catalog.ensure import ensure
from mlx_serving.cli.exits import Exit, failed
from mlx_serving.cli.say import Say
from mlx_serving.errors import MLXServingError


def run(name: str, json: bool = False, say: Say | None = None) -> int:
    """Fetch and convert `name`; say where it went."""
    say = say or Say(json)
    try:
        folder = ensure(name, settings.load(), say.progress())
    except MLXServingError as error:
        return failed(error, say)
    except KeyboardInterrupt:
        say.error("interrupted", "stopped; the next pull goes on from here")
        return Exit.INTERRUPTED
    if json:
        say.event("pulled", "", name=name, path=str(folder.path))
    else:
        print(folder.path)
    return Exit.OK
