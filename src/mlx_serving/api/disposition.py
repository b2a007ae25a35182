"""What becomes of a request's field, and the check that a route's table is.

honoured   it changes the answer as its definition says
advisory   it cannot change the tokens by definition; accepted, and named in a response header
refused    a 400 that names it, unless its value is neutral (null, or what it would be anyway)

A field that is in no table is refused as unknown, unless the server relaxes that (`unknown.left_out`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from mlx_serving.errors import UnsupportedParameter
from mlx_serving.unknown import refuse_unknown

Disposition = Literal["honoured", "advisory", "refused"]
Table = Mapping[str, "Field"]


class Field(msgspec.Struct, frozen=True):
    name: str
    disposition: Disposition
    note: str
    neutral: tuple[Any, ...] = ()
    """Values of a refused field that ask for nothing, besides null."""


Row = str | tuple[str, tuple[Any, ...]]
"""A note, or a note and the values that a refused field may have."""


def table(*groups: tuple[Disposition, dict[str, Row]]) -> Table:
    """A route's table from its fields by disposition."""
    built: dict[str, Field] = {}
    for disposition, rows in groups:
        for name, row in rows.items():
            note, neutral = (row, ()) if isinstance(row, str) else row
            assert name not in built, f"{name} has two dispositions"
            built[name] = Field(name, disposition, note, neutral)
    return built


def check(table: Table, body: Mapping[str, Any], *, at: str = "") -> list[str]:
    """The advisory fields that `body` names. Raises on refused and unknown ones; `at` is the
    path of the object that holds them."""
    advisory: list[str] = []
    for name, value in body.items():
        field = table.get(name)
        if field is None:
            refuse_unknown(name, at, table)
            continue
        if field.disposition == "honoured" or value is None:
            continue
        if field.disposition == "advisory":
            advisory.append(at + name)
        elif not any(_same(value, neutral) for neutral in field.neutral):
            raise UnsupportedParameter(
                f"'{at}{name}' is not supported: {field.note}.", param=at + name
            )
    return advisory


def _same(value: Any, neutral: Any) -> bool:
    # JSON's true is not 1, as Python's is.
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)
