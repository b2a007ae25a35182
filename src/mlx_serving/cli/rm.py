"""`mlx-serving rm MODEL…`: take models off this machine, after asking."""

from __future__ import annotations

import sys

from mlx_serving.catalog.inventory import locate
from mlx_serving.catalog.removal import removable_bytes, remove
from mlx_serving.cli.exits import Exit, failed
from mlx_serving.cli.models import Shelf
from mlx_serving.cli.say import Say, size
from mlx_serving.errors import MLXServingError, ModelNotFound


def run(models: list[str], yes: bool = False, json: bool = False, say: Say | None = None) -> int:
    """Stops at the first that cannot be removed."""
    say = say or Say(json)
    try:
        shelf = Shelf.load()
        for model in models:
            place = locate(model, shelf.home, shelf.cache)
            freed = removable_bytes(place)
            if not yes and not _agreed(f"Remove {place.name} ({size(freed)}, {place.path})?"):
                say.error("not_removed", f"{place.name} stays; --yes removes without asking")
                return Exit.FAILED
            remove(place, shelf.home)
            text = f"removed {place.name}: {size(freed)}"
            say.event("removed", text, name=place.name, path=str(place.path), freed_bytes=freed)
    except ModelNotFound as error:
        return failed(error, say)
    except MLXServingError as error:
        return failed(error, say, Exit.FAILED)
    return Exit.OK


def _agreed(question: str) -> bool:
    """Nobody to ask: no."""
    if not sys.stdin.isatty():
        return False
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
