"""What becomes of a request's field, and the check that a route's table is.

honoured   it changes the answer as its definition says
advisory   it cannot change the tokens by definition; accepted, and named in a response header
refused    a 400 that names it, unless its value is neutral (null, or what it would be anyway)

A field that is in no table is refused as unknown, unless the server relaxes that (`left_out`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from typing import Any, Literal

import msgspec

from mlx_serving.errors import InvalidRequest, UnsupportedParameter

Disposition = Literal["honoured", "advisory", "refused"]
Table = Mapping[str, "Field"]

left_out: ContextVar[list[str] | None] = ContextVar("left_out", default=None)
"""Where the running request's unknown fields are noted instead of being refused; None: refuse them."""

_MAX_NAME = 64
"""Longer names are cut in messages, and no similar field is looked for."""


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


def refuse_unknown(name: str, at: str, known: Iterable[str] = ()) -> None:
    """Raise for a field that nobody knows, or note that it is left out."""
    noted = left_out.get()
    if noted is None:
        raise _unknown(known, name, at)
    noted.append(at + name[:_MAX_NAME])


def _unknown(known: Iterable[str], name: str, at: str) -> InvalidRequest:
    shown = name if len(name) <= _MAX_NAME else name[:_MAX_NAME] + "..."
    message = f"Unknown field '{at}{shown}'."
    if len(name) <= _MAX_NAME and (close := difflib.get_close_matches(name, list(known), n=1)):
        message += f" Did you mean '{at}{close[0]}'?"
    return InvalidRequest(message, param=at + shown, code="unknown_parameter")
