"""Tables on stdout: drawn with rich on a terminal that is wide enough, plain columns elsewhere."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from typing import TextIO

Rows = Sequence[Sequence[str]]

_BETWEEN = 3
"""What drawing takes beside a column's text."""


def print_table(headers: Sequence[str], rows: Rows, out: TextIO | None = None) -> None:
    out = out or sys.stdout
    lines = [list(headers), *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headers))]
    # Squeezed into less, columns lose the names that they are there for; whole lines wrap.
    if out.isatty() and sum(widths) + _BETWEEN * len(widths) <= shutil.get_terminal_size().columns:
        _draw(headers, rows, out)
        return
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
