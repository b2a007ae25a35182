"""A request's fields that nobody here knows: refused by name, or noted where the server relaxes that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from typing import Any

from mlx_serving.errors import InvalidRequest

left_out: ContextVar[list[str] | None] = ContextVar("left_out", default=None)
"""Where the running request's unknown fields are noted instead of being refused; None: refuse them."""

_MAX_NAME = 64
"""Longer names are cut in messages, and no similar field is looked for."""


def refuse_others(given: Mapping[str, Any], known: Iterable[str], at: str) -> None:
    """`refuse_unknown` for every field of `given` that is not `known`."""
    names = set(known)
    for name in sorted(str(key) for key in given if key not in names):
        refuse_unknown(name, at, names)


def refuse_unknown(name: str, at: str, known: Iterable[str] = ()) -> None:
    """Raise for a field that nobody knows, or note that it is left out. `at` is the path of the
    object that holds it, up to the name."""
    noted = left_out.get()
    if noted is None:
        raise _unknown(known, name, at)
    noted.append(at + name[:_MAX_NAME])


def _unknown(known: Iterable[str], name: str, at: str) -> InvalidRequest:
    from difflib import get_close_matches  # only when something is wrong

    shown = name if len(name) <= _MAX_NAME else name[:_MAX_NAME] + "..."
    message = f"Unknown field '{at}{shown}'."
    if len(name) <= _MAX_NAME and (close := get_close_matches(name, sorted(known), 1, 0.7)):
        message += f" Did you mean '{at}{close[0]}'?"
    return InvalidRequest(message, param=at + shown, code="unknown_parameter")
