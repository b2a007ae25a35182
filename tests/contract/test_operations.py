"""docs/operations.md promises nothing that no test holds."""

from __future__ import annotations

import re
from pathlib import Path

from mlx_serving.config import FIELDS, flag_name

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
ROWS = [line for line in TEXT.splitlines() if line.startswith("| ")][1:]
TESTS = {
    name
    for path in (ROOT / "tests").rglob("test_*.py")
    for name in re.findall(r"def (test_\w+)", path.read_text(encoding="utf-8"))
}


def test_each_row_names_a_test_that_exists() -> None:
    assert len(ROWS) > 10
    assert [row for row in ROWS if not re.search(r"`test_\w+`", row.split("|")[-2])] == []
    assert set(re.findall(r"`(test_\w+)`", TEXT)) - TESTS == set()


def test_the_flags_it_names_exist_with_those_defaults() -> None:
    flags = {flag_name(name): field.default for name, field in FIELDS.items()}
    named = re.findall(r"`(--(?!no-)[\w-]+)`(?: \((\d+)\))?", TEXT)
    assert len(named) > 5
    assert [flag for flag, _ in named if flag not in flags] == []
    assert [f for f, default in named if default and flags[f] != float(default)] == []
