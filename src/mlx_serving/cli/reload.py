"""`mlx-serving reload`: a running server reads its file, variables and flags again."""

from __future__ import annotations

import json

from mlx_serving.cli.admin import Server
from mlx_serving.cli.exits import Exit


def run(server: Server) -> int:
    """Nothing changes where a setting is wrong: the server says which."""
    found = server.call("POST", "/v1/admin/reload")
    if found is None:
        return Exit.FAILED
    say, applied, waiting = server.say, found["applied"], found["needs_restart"]
    for name, value in applied.items():
        say.event("applied", f"{name} is {json.dumps(value)} now", name=name, value=value)
    for name in waiting:
        say.event("needs_restart", f"{name} differs, and changes with a restart", name=name)
    if not (applied or waiting):
        say.event("unchanged", f"{server.where} has these settings already")
    return Exit.OK
