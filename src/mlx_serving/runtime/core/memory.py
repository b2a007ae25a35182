"""What the models of one worker may hold beside their weights, in bytes: KV rows and prefix blocks.

Decided anew before each model's step from what all of them hold and want. Over the budget, in this
order: prefix caches shrink; who waits for a row goes on waiting, first come first served over all
models; running sequences are preempted (each model's scheduler picks its own); and at last the
parent is told how much is short, so that idle models leave.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Order = tuple[int, int]
"""A sequence's class and arrival, over all models."""


@dataclass(frozen=True, slots=True)
class Claim:
    """What one model holds and wants."""

    kv_bytes: int = 0
    """Of its rows."""
    prefix_bytes: int = 0
    growth_bytes: int = 0
    """What its rows will need on top before long."""
    first: Order | None = None
    """Of the first sequence that waits for a row."""
    first_bytes: int = 0
    """What that one's row adds."""


@dataclass(frozen=True, slots=True)
class Room:
    """What one model may hold now."""

    kv_bytes: int
    admit_bytes: int
    """The same for rows that a waiting sequence would join: less what is kept for an earlier one."""
    prefix_bytes: int
    total_bytes: int
    """Both together: what is free counts in each, and can be taken once."""


@dataclass(frozen=True, slots=True)
class Sharing:
    rooms: tuple[Room, ...]
    short_bytes: int = 0
    """What the first waiting sequence lacks though nothing else is held: models have to leave."""


def share(capacity_bytes: int, claims: Sequence[Claim]) -> Sharing:
    """Rooms in the order of the claims. What one model gives up is another's once it is free."""
    free = capacity_bytes - sum(c.kv_bytes + c.prefix_bytes for c in claims)
    waiting = [i for i, c in enumerate(claims) if c.first is not None]
    head = min(waiting, key=lambda i: claims[i].first or (0, 0), default=None)
    kept = 0 if head is None else claims[head].first_bytes
    need = kept + sum(c.growth_bytes for c in claims)
    given = _given([c.prefix_bytes for c in claims], max(0, need - free))
    rooms = []
    for i, claim in enumerate(claims):
        kv = max(0, claim.kv_bytes + free + given[i])
        left = claim.prefix_bytes - given[i]
        admit = kv if i == head else max(0, kv - kept)
        rooms.append(Room(kv, admit, left + max(0, free - need), kv + left))
    held = sum(c.kv_bytes for c in claims)
    return Sharing(tuple(rooms), 0 if held else max(0, kept - capacity_bytes))


def lacks(claim: Claim, room: Room) -> bool:
    """Whether the first that waits could have a row, were there memory for it."""
    return claim.first is not None and claim.kv_bytes + claim.first_bytes > room.admit_bytes


def _given(held: Sequence[int], wanted: int) -> list[int]:
    """What each gives of what it holds; who holds most gives first."""
    given = [0] * len(held)
    for i in sorted(range(len(held)), key=lambda i: -held[i]):
        given[i] = min(held[i], wanted)
        wanted -= given[i]
    return given
