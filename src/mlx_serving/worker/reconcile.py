"""What has to be done so that a worker has what we believe it has: a pure comparison."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Differences:
    unload: tuple[str, ...]
    """Models that it has and nobody here asked for."""
    cancel: tuple[int, ...]
    """Sequences that it runs: orphans, since rows sent while nobody listened are lost. Those that
    still have a reader here are submitted anew, with the tokens that did arrive."""


def compare(wanted: Iterable[str], models: Iterable[str], sequences: Iterable[int]) -> Differences:
    """`wanted`: the models that we believe in; `models`, `sequences`: what the worker reports when
    it connects."""
    believed = set(wanted)
    return Differences(
        unload=tuple(model for model in models if model not in believed),
        cancel=tuple(sequences),
    )
