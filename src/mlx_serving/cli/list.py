"""`mlx-serving list`: every model on this machine, what it is, and whether it can be served."""

from __future__ import annotations

import json as to_json

from mlx_serving.catalog.health import describe, this_machine
from mlx_serving.catalog.inventory import Entry, inventory
from mlx_serving.cli.exits import Exit, failed
from mlx_serving.cli.models import NOT_FETCHED, Shelf, count, entry_json
from mlx_serving.cli.say import Say, size
from mlx_serving.cli.table import print_table
from mlx_serving.errors import ConfigError

HEADERS = ("NAME", "STATUS", "SIZE", "ARCHITECTURE", "PARAMETERS", "WEIGHTS", "CONTEXT", "TAKES", "DRAFTS")  # fmt: skip


def run(json: bool = False, say: Say | None = None) -> int:
    say = say or Say(json)
    try:
        shelf = Shelf.load()
    except ConfigError as error:
        return failed(error, say)
    entries = inventory(shelf.home, shelf.cache, this_machine(shelf.config))
    if json:
        print(to_json.dumps({"models": [entry_json(entry) for entry in entries]}))
        return Exit.OK
    print_table(HEADERS, [_row(entry) for entry in entries])
    for entry in entries:
        if entry.verdict is not None and (reason := describe(entry.verdict)[1]):
            print(f"\n{entry.place.name}: {reason}")
    return Exit.OK


def _what(entry: Entry) -> str:
    if entry.adapter is not None:
        return f"{entry.adapter.kind} adapter, rank {entry.adapter.rank}"
    folder = entry.facts.folder if entry.facts else None
    return (folder.architecture or folder.model_type) if folder else ""


def _row(entry: Entry) -> tuple[str, ...]:
    facts = entry.facts
    folder = facts.folder if facts else None
    status = NOT_FETCHED if entry.verdict is None else describe(entry.verdict)[0]
    return (
        entry.place.name,
        status,
        size(entry.disk_bytes) if entry.files else "",
        _what(entry),
        count(facts.parameters if facts else None),
        (folder.quantization or folder.dtype or "") if folder else "",
        str((folder.context_length if folder else None) or ""),
        "+".join(facts.modalities) if facts else "",
        ", ".join(entry.drafts),
    )
