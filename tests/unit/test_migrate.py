"""docs/migrate.md: what it says of our side is so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from mlx_serving.answers import PARAMS
from mlx_serving.api import fields
from mlx_serving.api.app import ENDPOINTS
from mlx_serving.config import FIELDS, flag_name
from mlx_serving.spellings import OPTIONS, SETTINGS, Refused, Renamed, find

FLAGS = {flag_name(name) for name in FIELDS} | {"--config", "--json"}
PATHS = {endpoint.split(" ")[1] for endpoint, _ in ENDPOINTS}
OPENAI = (fields.CHAT, fields.COMPLETIONS)
OLLAMA = tuple(fields.ROUTES[route] for route in ("/api/chat", "/api/generate"))
TABLES = {
    "mlx_lm.server": OPENAI,
    "Ollama": OLLAMA,
    "Ollama option": (fields.ROUTES["/api/chat and /api/generate options"],),
    "llama.cpp's server": OPENAI,
    "vLLM": OPENAI,
}


class Row(NamedTuple):
    section: str
    kind: str
    """The head of its first column."""
    theirs: list[str]
    ours: str


def rows() -> list[Row]:
    text = (Path(__file__).parents[2] / "docs" / "migrate.md").read_text()
    found: list[Row] = []
    section = kind = ""
    for line, after in zip(text.splitlines(), [*text.splitlines()[1:], ""], strict=True):
        if line.startswith("## From "):
            section = line.removeprefix("## From ")
        if line.startswith("| ") and after.startswith("|---"):
            kind = line.split("|")[1].strip(" `")
        elif line.startswith("| "):
            _, theirs, ours, _ = line.split("|")
            found.append(Row(section, kind, ticked(theirs), ours.strip()))
    return found


def ticked(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


ROWS = rows()


def dispositions(row: Row, name: str) -> set[str]:
    key = "Ollama option" if row.kind == "option" else row.section
    return {table[name].disposition for table in TABLES[key] if name in table} or {"refused"}


def test_there_is_a_table_for_each() -> None:
    assert {(row.section, row.kind) for row in ROWS} == {
        *((section, "flag") for section in ("mlx_lm.server", "llama.cpp's server", "vLLM")),
        *((section, "field") for section in ("mlx_lm.server", "llama.cpp's server", "vLLM")),
        *(("Ollama", kind) for kind in ("variable", "field", "option")),
        *(("mlx-engine", kind) for kind in ("load_model", "create_generator")),
    }


@pytest.mark.parametrize("row", [r for r in ROWS if r.kind in ("flag", "variable")], ids=str)
def test_flags(row: Row) -> None:
    for name in ticked(row.ours):
        if name.startswith("--"):
            assert name in FLAGS
        elif name.startswith("/"):
            assert name in PATHS
        elif name.islower():
            assert "honoured" in dispositions(row._replace(section="vLLM"), name)
    if row.ours.startswith("not there"):
        assert not FLAGS & set(row.theirs), "it is there"
    elif row.ours.startswith("`"):
        assert ticked(row.ours)[0] in FLAGS


@pytest.mark.parametrize("row", [r for r in ROWS if r.kind in ("field", "option")], ids=str)
def test_fields(row: Row) -> None:
    for name in row.theirs:
        told = dispositions(row, name)
        if row.ours.startswith("the same"):
            assert "honoured" in told, name
        elif row.ours.startswith(("advisory", "refused")):
            assert told == {row.ours.split(",")[0].split(":")[0]}, name
        else:
            (ours,) = ticked(row.ours)[:1]
            assert told == {"refused"}, f"{name} is accepted as it is"
            assert "honoured" in dispositions(row, ours)


@pytest.mark.parametrize("row", [r for r in ROWS if r.section == "mlx-engine"], ids=str)
def test_the_librarys_names(row: Row) -> None:
    table, ours = (SETTINGS, FIELDS) if row.kind == "load_model" else (OPTIONS, PARAMS)
    for name in row.theirs:
        match find(name, ours, table):
            case Renamed(to):
                assert row.ours.startswith("the same" if to == name else f"`{to}`")
            case Refused(_, neutral):
                assert row.ours.startswith("refused")
                assert row.ours.startswith("refused, unless") == bool(neutral)
            case None:
                pytest.fail(f"{name} is in no table")
