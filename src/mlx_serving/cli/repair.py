"""`mlx-serving repair MODEL`: fetch or make again what is broken of a model."""

from __future__ import annotations

import json as to_json
from typing import assert_never

from mlx_serving.catalog.health import Broken, Healthy, Unable, Verdict, this_machine
from mlx_serving.catalog.health import describe as in_words
from mlx_serving.catalog.inventory import locate
from mlx_serving.catalog.repair import repair
from mlx_serving.cli.exits import Exit, failed
from mlx_serving.cli.models import Shelf, verdict_json
from mlx_serving.cli.say import Say
from mlx_serving.errors import MLXServingError


def run(model: str, json: bool = False, say: Say | None = None) -> int:
    say = say or Say(json)
    try:
        shelf = Shelf.load()
        place = locate(model, shelf.home, shelf.cache)
        progress = Say(err=say.err).progress()
        before, after = repair(
            place, this_machine(shelf.config), shelf.home, progress, offline=shelf.config.offline
        )
    except MLXServingError as error:
        return failed(error, say)
    except KeyboardInterrupt:
        say.error("interrupted", "stopped; the next repair goes on from here")
        return Exit.INTERRUPTED
    if json:
        print(
            to_json.dumps(
                {
                    "name": place.name,
                    "path": str(place.path),
                    "before": verdict_json(before),
                    **verdict_json(after),
                }
            )
        )
    else:
        print(f"{place.name}: {_sentence(before, after)}")
    return _exit(after)


def _sentence(before: Verdict, after: Verdict) -> str:
    if not isinstance(before, Broken):
        word, reason = in_words(before)
        return f"no file is broken ({reason or word})"
    mended = ", ".join(dict.fromkeys(problem.file for problem in before.problems))
    match after:
        case Healthy():
            return f"mended {mended}"
        case Broken(problems):
            return f"still broken: {'; '.join(map(str, problems))}"
        case Unable():
            return f"mended {mended}, but {in_words(after)[1]}"
        case _:
            assert_never(after)


def _exit(after: Verdict) -> Exit:
    match after:
        case Healthy():
            return Exit.OK
        case Broken():
            return Exit.FILES_BROKEN
        case Unable():
            return Exit.CANNOT_RUN
        case _:
            assert_never(after)
