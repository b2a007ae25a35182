"""`mlx-serving canary …` and `mlx-serving ab …`: a running server's rollouts, over its admin API."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mlx_serving.cli.admin import Server
from mlx_serving.cli.exits import Exit
from mlx_serving.cli.table import print_facts, print_table

ROLLOUTS = "/v1/rollouts"
SHOWN = "name", "model", "variant", "mode", "status"


def start(server: Server, spec: Mapping[str, Any]) -> int:
    return _shown(server, server.call("POST", ROLLOUTS, dict(spec)))


def status(server: Server, name: str | None) -> int:
    """One rollout with its figures, or a line for each."""
    if name is not None:
        return _shown(server, server.call("GET", f"{ROLLOUTS}/{quote(name, safe='')}"))
    found = server.call("GET", ROLLOUTS)
    if found is None:
        return Exit.FAILED
    if server.say.as_json:
        print(json.dumps(found["data"]))
        return Exit.OK
    if not found["data"]:
        server.say.event("none", f"{server.where} has no rollouts")
        return Exit.OK
    rows = [[*(str(r[k]) for k in SHOWN), _share(r), _samples(r), r["last"]] for r in found["data"]]
    print_table([*SHOWN, "share", "requests", "last"], rows)
    return Exit.OK


def act(server: Server, name: str, action: str) -> int:
    """`promote` or `rollback`."""
    return _shown(server, server.call("POST", f"{ROLLOUTS}/{quote(name, safe='')}/{action}"))


def remove(server: Server, name: str) -> int:
    found = server.call("DELETE", f"{ROLLOUTS}/{quote(name, safe='')}")
    if found is None:
        return Exit.FAILED
    server.say.event("removed", f"{name} is forgotten", name=name)
    return Exit.OK


def plot(server: Server, name: str, png: Path | None = None) -> int:
    """Each metric's difference with its bound, drawn in the terminal or into a file."""
    found = server.call("GET", f"{ROLLOUTS}/{quote(name, safe='')}")
    if found is None:
        return Exit.FAILED
    if not found["metrics"]:
        server.say.error("too_early", "there are not enough answers on both sides to compare yet")
        return Exit.FAILED
    if png is not None:
        return _picture(server, found, png)
    from mlx_serving.cli.rollout_plot import draw

    print(draw(found["metrics"]))
    return Exit.OK


def _picture(server: Server, report: Mapping[str, Any], file: Path) -> int:
    from mlx_serving.cli.rollout_png import draw

    try:
        draw(report, file)
    except ImportError:
        install = "pip install 'mlx-serving[plot]'"
        server.say.error("no_matplotlib", "a PNG is drawn by matplotlib, which is missing", install)
        return Exit.FAILED
    except OSError as error:
        server.say.error("not_written", f"{file} cannot be written: {error.strerror}")
        return Exit.FAILED
    server.say.event("drawn", f"{file} is written", file=str(file))
    return Exit.OK


def _shown(server: Server, report: Any) -> int:
    if report is None:
        return Exit.FAILED
    if server.say.as_json:
        print(json.dumps(report))
        return Exit.OK
    stage = f"{report['stage']} of {report['stages']}" if report["stages"] > 1 else ""
    facts = [(name, str(report[name])) for name in SHOWN]
    facts += [("stage", stage), ("share", _share(report)), ("requests", _samples(report))]
    print_facts([*facts, ("last", report["last"])])
    if report["metrics"]:
        print()
        print_table(*_metrics(report))
    if report["notes"]:
        print()
    for note in report["notes"]:
        print(f"{datetime.fromtimestamp(note['at_s']):%Y-%m-%d %H:%M:%S}  {note['what']}")
    return Exit.OK


def _metrics(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    head = ["metric", report["model"], report["variant"], "difference", "always within"]
    rows = [
        [
            m["metric"],
            *(_mean(m, mean) for mean in m["mean"]),
            f"{m['difference']:+.1f} {m['unit']}",
            f"{m['low']:+.1f} to {m['high']:+.1f}",
            "{:+.1f} to {:+.1f}".format(*m["ci"]) if m["ci"] else "",
            f"{m['p']:.2g}" if m["p"] is not None else "",
            f"{m['d']:+.2f}" if m["d"] is not None else "",
        ]
        for m in report["metrics"]
    ]
    return [*head, "this stage, 95 %", "p", "d"], rows


def _mean(metric: Mapping[str, Any], mean: float) -> str:
    if metric["scale"] == "share" or metric["metric"] == "logprob":
        return f"{100 * mean:.1f} %"
    return f"{mean:.1f}" + ("" if metric["metric"] == "tokens_per_s" else " ms")


def _share(report: Mapping[str, Any]) -> str:
    return f"{100 * report['share']:g} %"


def _samples(report: Mapping[str, Any]) -> str:
    ours, theirs = report["samples"]
    return f"{ours} + {theirs}"
