"""Tables on stdout: drawn with rich on a terminal, plain columns in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TextIO

Rows = Sequence[Sequence[str]]


def print_table(headers: Sequence[str], rows: Rows, out: TextIO | None = None) -> None:
    out = out or sys.stdout
    if out.isatty():
        _draw(headers, rows, out)
        return
    lines = [list(headers), *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headers))]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip(), file=out)


def print_facts(facts: Sequence[tuple[str, str]], out: TextIO | None = None) -> None:
    """Names and values, one a line; a name without a value is left out."""
    given = [(name, value) for name, value in facts if value]
    width = max((len(name) for name, _ in given), default=0)
    for name, value in given:
        print(f"{name.ljust(width)}  {value}", file=out or sys.stdout)


def _draw(headers: Sequence[str], rows: Rows, out: TextIO) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*headers, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*map(Text, row))  # names may hold what rich takes for markup
    Console(file=out).print(table)
