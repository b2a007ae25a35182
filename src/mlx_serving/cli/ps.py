"""`mlx-serving ps`: what a running server has loaded, and what it is doing."""

from __future__ import annotations

import json as to_json
import re
from typing import Any

import httpx

from mlx_serving.cli.exits import Exit
from mlx_serving.cli.say import Say, size
from mlx_serving.cli.table import print_table
from mlx_serving.cli.where import Where

TIMEOUT_S = 5.0
HEADERS = ("MODEL", "STATUS", "WEIGHTS", "CONTEXT", "RUNNING", "WAITING", "PINNED", "REASON")
_GAUGE = re.compile(r'mlx_serving_(running|waiting)_sequences\{model="((?:[^"\\]|\\.)*)"\} (\S+)')


def run(
    where: Where,
    json: bool = False,
    say: Say | None = None,
    api_key: str | None = None,
) -> int:
    say = say or Say(json)
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        with where.client(timeout=TIMEOUT_S, headers=headers) as http:
            report = ask(http)
    except httpx.HTTPStatusError as error:
        remedy = "give --api-key" if error.response.status_code in (401, 403) else None
        say.error("refused", f"{where} answered {error.response.status_code}", remedy)
        return Exit.FAILED
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        say.error("no_server", f"no server of ours answers at {where}: {error}")
        return Exit.FAILED
    if json:
        print(to_json.dumps(report))
    else:
        _print(report)
    return Exit.OK


def ask(http: httpx.Client) -> dict[str, Any]:
    """From /health, /api/ps and /metrics. Raises what httpx raises, or ValueError, KeyError, TypeError
    where the answers are not a server's of ours."""
    health = http.get("/health").raise_for_status().json()
    loaded = http.get("/api/ps").raise_for_status().json()["models"]
    rows = _rows(http.get("/metrics").raise_for_status().text)
    sizes = {model["name"].removesuffix(":latest"): model for model in loaded}
    models = [
        {
            **model,
            "weight_bytes": sizes.get(model["id"], {}).get("size_vram"),
            "context_length": sizes.get(model["id"], {}).get("context_length"),
            "running": rows.get(("running", model["id"]), 0),
            "waiting": rows.get(("waiting", model["id"]), 0),
        }
        for model in health["models"]
    ]
    return {
        "status": health["status"],
        "reasons": health["reasons"],
        "pid": health["pid"],
        "open_requests": health["open_requests"],
        "models": models,
        "workers": health["workers"],
    }


def _rows(metrics: str) -> dict[tuple[str, str], int]:
    return {(kind, model): int(float(n)) for kind, model, n in _GAUGE.findall(metrics)}


def _print(report: dict[str, Any]) -> None:
    print_table(HEADERS, [_row(model) for model in report["models"]])
    print(f"\nserver {report['pid']}: {report['status']}, {report['open_requests']} open requests")
    for worker in report["workers"]:
        cause = f": {worker['cause']}" if worker["cause"] else ""
        restarts = f", restarted {worker['restarts']} times" if worker["restarts"] else ""
        print(f"worker {worker['pid'] or '-'}: {worker['state']}{restarts}{cause}")


def _row(model: dict[str, Any]) -> tuple[str, ...]:
    return (
        model["id"],
        model["status"],
        size(model["weight_bytes"]) if model["weight_bytes"] else "",
        str(model["context_length"] or ""),
        str(model["running"]),
        str(model["waiting"]),
        _pinned(model),
        model["reason"] or "",
    )


def _pinned(model: dict[str, Any]) -> str:
    """And whether its weights are in physical memory for good."""
    if not model.get("pinned"):
        return ""
    if model["wired_bytes"]:
        return f"{size(model['wired_bytes'])} locked"
    return f"not locked: {model['not_wired']}" if model["not_wired"] else "yes"
