"""`mlx-serving flag …`: a running server's feature flags, one of its settings."""

from __future__ import annotations

import json

from mlx_serving.cli.admin import Server
from mlx_serving.cli.exits import Exit
from mlx_serving.cli.table import print_table
from mlx_serving.traffic.feature_flags import Flag, parse, with_percent

SETTINGS = "/v1/admin/config"
SETTING = "feature_flags"


def show(server: Server) -> int:
    texts = _texts(server)
    if texts is None:
        return Exit.FAILED
    flags = [parse(text) for text in texts]
    if server.say.as_json:
        print(json.dumps([_facts(flag) for flag in flags]))
        return Exit.OK
    if not flags:
        server.say.event("none", f"{server.where} has no feature flags")
        return Exit.OK
    rows = [[str(value) for value in _facts(flag).values()] for flag in flags]
    print_table(list(_facts(flags[0])), [["" if v == "None" else v for v in row] for row in rows])
    return Exit.OK


def set_percent(server: Server, name: str, percent: float) -> int:
    texts = _texts(server)
    if texts is None:
        return Exit.FAILED
    if name not in [parse(text).name for text in texts]:
        server.say.error("no_flag", f"{server.where} has no feature flag '{name}'")
        return Exit.FAILED
    wanted = [with_percent(t, percent) if parse(t).name == name else t for t in texts]
    if server.call("PATCH", SETTINGS, {SETTING: wanted}) is None:
        return Exit.FAILED
    server.say.event("flag_set", f"{name} reaches {percent:g} % now", name=name, percent=percent)
    return Exit.OK


def _texts(server: Server) -> list[str] | None:
    found = server.call("GET", SETTINGS)
    return None if found is None else list(found["settings"][SETTING])


def _facts(flag: Flag) -> dict[str, object]:
    return {
        "name": flag.name,
        "percent": round(100 * flag.share, 6),
        "model": flag.model,
        "use": flag.use,
        "max_tokens": flag.max_tokens,
        "timeout": flag.timeout_s,
    }
