"""Who may have caused a worker's death, so that a poison is given up alone.

The rule: a worker says which sequences take a row before it computes the step in which they
begin (`wire.Started`). Who has begun and has had no token since when the worker dies is a
suspect of that death; a token acquits. Suspects go to the next worker after everybody else and
one at a time, each once the one before it has had a token, so that a second death has few
suspects. Before the death that would give one of them up nobody begins beside them who has not
begun before (`go_alone`). Who is a suspect of `limit` deaths in a row is given up.

So a sequence that gets tokens between two deaths is never given up, however many workers die
under it, and neither is one that only waited for a row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class Accused(Protocol):
    starting: bool
    """It has begun in the worker, and has had no token since."""
    deaths: int
    """Of how many deaths in a row it is a suspect."""


A = TypeVar("A", bound=Accused)


@dataclass(frozen=True, slots=True)
class Verdict(Generic[A]):
    free: list[A]
    """May go to the next worker at once."""
    suspects: list[A]
    """Go there one at a time, in this order: whom least speaks against first."""
    guilty: list[A]


def judge(sequences: Iterable[A], limit: int) -> Verdict[A]:
    """Sort those that were with the worker that died, or are waiting for the next one."""
    verdict: Verdict[A] = Verdict([], [], [])
    for sequence in sequences:
        if sequence.starting:
            sequence.deaths += 1
            sequence.starting = False
        if sequence.deaths >= limit:
            verdict.guilty.append(sequence)
        elif sequence.deaths:
            verdict.suspects.append(sequence)
        else:
            verdict.free.append(sequence)
    verdict.suspects.sort(key=lambda sequence: sequence.deaths)
    return verdict


def go_alone(suspects: Iterable[Accused], limit: int) -> bool:
    """Whether sequences that have had no token wait until the suspects have had theirs."""
    return any(suspect.deaths >= limit - 1 for suspect in suspects)


def acquit(sequence: Accused) -> None:
    """It has had a token."""
    sequence.starting = False
    sequence.deaths = 0
