"""Who leaves for whom, as a table."""

from __future__ import annotations

import random

import pytest

from mlx_serving.catalog.budget import (
    Decision,
    Drain,
    Evict,
    Fits,
    Hold,
    Never,
    Resident,
    decide,
    estimate_bytes,
    measured_bytes,
)

GIB = 1 << 30


def idle(model_id: str, size: int, used_s: float = 0.0, **more: bool) -> Resident:
    return Resident(model_id, size, used_s, **more)


def busy(model_id: str, size: int, used_s: float = 0.0, **more: bool) -> Resident:
    return Resident(model_id, size, used_s, busy=True, **more)


@pytest.mark.parametrize(
    ("residents", "need", "waited_s", "decision"),
    [
        ([], 10, 0, Fits()),
        ([], 11, 0, Never(10, ())),
        ([busy("a", 4)], 6, 0, Fits()),
        # The least recently used idle model goes, and no more of them than needed.
        ([idle("a", 5, 1), idle("b", 5, 2)], 5, 0, Evict(("a",))),
        ([idle("a", 5, 2), idle("b", 5, 1)], 5, 0, Evict(("b",))),
        ([idle("a", 5), idle("b", 5)], 6, 0, Evict(("a", "b"))),
        ([idle("a", 2, 1), idle("b", 8, 2)], 8, 0, Evict(("b",))),
        ([busy("a", 5, 1), idle("b", 5, 2)], 5, 0, Evict(("b",))),
        # Busy ones are left alone until patience is over.
        ([busy("a", 5, 1), busy("b", 5, 2)], 5, 0, Hold()),
        ([busy("a", 5, 1), busy("b", 5, 2)], 5, 9, Drain(("a",))),
        ([busy("a", 5, 1), idle("b", 5, 2)], 10, 9, Drain(("b", "a"))),
        # Who loads is not disturbed; who leaves already is waited for.
        ([busy("a", 10, loading=True)], 5, 9, Hold()),
        ([busy("a", 5, 1, leaving=True), busy("b", 5, 2)], 5, 9, Hold()),
        ([busy("a", 5, 1, leaving=True), busy("b", 5, 2)], 6, 9, Drain(("b",))),
        # What is pinned stays, idle or not.
        ([idle("a", 5, 1, pinned=True), idle("b", 5, 2)], 5, 0, Evict(("b",))),
        ([idle("a", 5, pinned=True)], 6, 9, Never(5, ("a",))),
        ([idle("a", 5, pinned=True), busy("b", 5)], 5, 0, Hold()),
    ],
)
def test_who_leaves(
    residents: list[Resident], need: int, waited_s: float, decision: Decision
) -> None:
    assert decide(10, residents, need, waited_s=waited_s, patience_s=5) == decision


def test_obeying_always_makes_room_or_waits_for_somebody() -> None:
    """Over random houses: who is told to leave may leave, suffices, and nobody of them is needless."""
    rng = random.Random(5)
    for _ in range(5000):
        house = [
            Resident(
                str(i),
                rng.randint(1, 9),
                rng.random(),
                busy=rng.random() < 0.5,
                pinned=rng.random() < 0.2,
                loading=rng.random() < 0.1,
                leaving=rng.random() < 0.1,
            )
            for i in range(rng.randint(0, 6))
        ]
        budget, need = sum(r.need_bytes for r in house) + rng.randint(0, 5), rng.randint(1, 20)
        waited_s = rng.choice([0, 100])
        decision = decide(budget, house, need, waited_s=waited_s)
        free = budget - sum(r.need_bytes for r in house)
        by_id = {r.model_id: r for r in house}
        match decision:
            case Fits():
                assert need <= free
            case Evict(ids) | Drain(ids):
                gone = [by_id[i] for i in ids]
                assert not any(r.pinned or r.loading or r.leaving for r in gone)
                assert not any(r.busy for r in gone) or (waited_s and isinstance(decision, Drain))
                freed = sum(r.need_bytes for r in gone)
                leaving = sum(r.need_bytes for r in house if r.leaving)
                assert free + leaving + freed >= need
                assert all(free + leaving + freed - r.need_bytes < need for r in gone)
            case Never(most, pinned):
                assert need > most == budget - sum(r.need_bytes for r in house if r.pinned)
                assert pinned == tuple(r.model_id for r in house if r.pinned)
            case Hold():
                assert need > free
                assert not all(r.pinned for r in house)


def test_needs() -> None:
    assert estimate_bytes(8 * GIB, widened=False) == 9 * GIB
    assert estimate_bytes(8 * GIB, widened=True) == 18 * GIB
    assert estimate_bytes(0, widened=True) == 32 << 20
    assert measured_bytes(GIB, 1 << 20, 4096) == 2 * GIB
    assert measured_bytes(GIB, 1 << 20, 16) == GIB + (32 << 20)
