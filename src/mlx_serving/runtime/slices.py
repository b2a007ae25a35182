"""Work that can be interrupted: a generator that yields wherever it may wait, and returns a result."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")

Slices = Generator[None, None, T]


def whole(slices: Slices[T]) -> T:
    """The result, without interruption."""
    while True:
        try:
            next(slices)
        except StopIteration as ended:
            result: T = ended.value
            return result
