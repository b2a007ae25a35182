"""What has to be done so that a worker has what we believe it has: a pure comparison."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Differences:
    load: tuple[str, ...]
    unload: tuple[str, ...]
    """Models that nobody here asked for."""
    orphans: tuple[int, ...]
    """Sequences that nobody here reads: to be cancelled."""
    keep: frozenset[int]
    """Sequences that run there and have a reader here: not to be sent again."""


def compare(
    wanted_models: Iterable[str],
    wanted_sequences: Iterable[int],
    models: Iterable[str],
    sequences: Iterable[int],
) -> Differences:
    """`wanted_*`: ours; `models` and `sequences`: as the worker reports them when it connects."""
    ours, theirs = list(wanted_models), list(models)
    running = set(sequences)
    keep = running.intersection(wanted_sequences)
    return Differences(
        load=tuple(m for m in ours if m not in theirs),
        unload=tuple(m for m in theirs if m not in ours),
        orphans=tuple(sorted(running - keep)),
        keep=frozenset(keep),
    )
