"""`mlx-serving convert`: a model with other weights: fewer bits, a mixed recipe, floats."""

from __future__ import annotations

from mlx_serving import config_sources as settings
from mlx_serving.catalog.conversion import Wish, convert
from mlx_serving.cli.exits import Exit, failed
from mlx_serving.cli.say import Say, size
from mlx_serving.errors import MLXServingError


def run(
    model: str, wish: Wish, name: str | None = None, json: bool = False, say: Say | None = None
) -> int:
    say = say or Say(json)
    try:
        folder = convert(model, wish, settings.load(), say.progress(), name=name)
    except MLXServingError as error:
        return failed(error, say)
    except KeyboardInterrupt:
        say.error("interrupted", "stopped; nothing is left of the conversion")
        return Exit.INTERRUPTED
    taken = sum(file.stat().st_size for file in folder.iterdir())
    if json:
        say.event("converted", "", name=folder.name, path=str(folder), size_bytes=taken)
    else:
        print(f"{folder.name}: {size(taken)} in {folder}")
    return Exit.OK
