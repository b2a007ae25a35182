"""`mlx-serving health`: which files are broken, and what this installation cannot run.

The two have exit codes of their own, since the one is mended by `repair` and the other is not.
"""

from __future__ import annotations

import json as to_json
from collections.abc import Sequence
from typing import assert_never

from mlx_serving.catalog.digests import Which, check_digests, expected
from mlx_serving.catalog.health import (
    Broken,
    Healthy,
    Machine,
    Unable,
    Verdict,
    examine,
    this_machine,
)
from mlx_serving.catalog.inventory import Place, locate, places
from mlx_serving.catalog.known import Known
from mlx_serving.cli.exits import Exit, failed
from mlx_serving.cli.models import Shelf, verdict_json
from mlx_serving.cli.say import Say
from mlx_serving.errors import ConfigError, ModelNotFound


def run(model: str | None, deep: bool = False, json: bool = False, say: Say | None = None) -> int:
    """Examine one model or all, reading files that were never read (`deep`: all of them)."""
    say = say or Say(json)
    try:
        shelf = Shelf.load()
        found = (
            [locate(model, shelf.home, shelf.cache)] if model else places(shelf.home, shelf.cache)
        )
    except (ConfigError, ModelNotFound) as error:
        return failed(error, say)
    machine, known = this_machine(shelf.config), Known(shelf.home)
    which: Which = "all" if deep else "unread"
    there = [place for place in found if place.path is not None]
    verdicts = [_examine(place, machine, known, which, say) for place in there]
    if json:
        pairs = zip(there, verdicts, strict=True)
        models = [
            {"name": place.name, "path": str(place.path), **verdict_json(verdict)}
            for place, verdict in pairs
        ]
        print(to_json.dumps({"models": models}))
    else:
        for place, verdict in zip(there, verdicts, strict=True):
            print("\n".join(_lines(place, verdict)))
    return exit_code(verdicts)


def exit_code(verdicts: Sequence[Verdict]) -> Exit:
    """Broken files before what cannot run."""
    if any(isinstance(verdict, Broken) for verdict in verdicts):
        return Exit.FILES_BROKEN
    if any(isinstance(verdict, Unable) for verdict in verdicts):
        return Exit.CANNOT_RUN
    return Exit.OK


def _examine(place: Place, machine: Machine, known: Known, which: Which, say: Say) -> Verdict:
    assert place.path is not None
    # With --json, stdout is the report's alone.
    progress = Say(err=say.err).progress()
    wrong = check_digests(expected(place.path), known, which, progress, place.name)
    return examine(place.path, machine, wrong)


def _lines(place: Place, verdict: Verdict) -> list[str]:
    match verdict:
        case Healthy():
            return [f"ok          {place.name}"]
        case Broken(problems):
            listed = [f"              {p.file}: {p.detail}  [{p.kind}]" for p in problems]
            mend = f"mend it with: mlx-serving repair {place.name}"
            if place.source == "folder":
                mend = f"nothing tells where its files came from: put them right in {place.path}"
            return [f"BROKEN      {place.name}", *listed, f"              {mend}"]
        case Unable(causes):
            listed = [f"              {cause}  [{cause.kind}]" for cause in causes]
            return [f"CANNOT RUN  {place.name}", *listed]
        case _:
            assert_never(verdict)
