"""Idle models that leave for the sake of those in use, and come back."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from mlx_serving.catalog.lifecycle import Absent, LoadBegan, ModelSlot, NoRoom, Ready
from mlx_serving.catalog.relief import IDLE_S, LACKING_S, Relief
from mlx_serving.worker.wire import StepStats

WAITS, FLOWS = StepStats("a", lacks_memory=True), StepStats("a")


class Hands:
    def __init__(self) -> None:
        self.room = True

    async def bring_up(self, slot: ModelSlot[Any], *, asked: bool) -> str:
        if not (self.room or asked):
            raise NoRoom
        slot.enter(LoadBegan())
        return slot.model_id

    async def take_down(self, slot: ModelSlot[Any]) -> None:
        pass


class House:
    """Models in memory that were last used in their order, a second apart, a long time ago."""

    def __init__(self, names: str) -> None:
        self.hands, self.now_s = Hands(), 10_000.0
        self.slots = {name: ModelSlot(name, name, (), self.hands) for name in names}
        self.relief = Relief(list(self.slots.values()), now=lambda: self.now_s)

    async def open(self) -> House:
        for i, slot in enumerate(self.slots.values()):
            await slot.ready()
            slot.used_s = self.now_s - IDLE_S - 100.0 + i
        return self

    async def settled(self) -> str:
        """Names of those in memory once nothing moves."""
        for _ in range(10):
            await asyncio.sleep(0)
        return "".join(n for n, slot in self.slots.items() if isinstance(slot.state, Ready))


async def test_the_least_recently_used_leaves_and_comes_back():
    house = await House("abc").open()
    house.relief.keep_out(1)
    assert await house.settled() == "bc"
    house.relief.keep_out(1)  # as before
    assert await house.settled() == "bc"
    house.relief.keep_out(3)
    assert await house.settled() == ""
    house.relief.keep_out(1)
    assert await house.settled() == "bc"
    house.relief.keep_out(0)
    assert await house.settled() == "abc"


async def test_who_is_busy_pinned_or_was_used_lately_stays():
    house = await House("abc").open()
    await house.slots["a"].acquire()
    house.slots["b"].pin(True)
    house.slots["c"].used_s = house.now_s - IDLE_S + 1
    house.relief.keep_out(2)
    assert await house.settled() == "abc"
    house.now_s += 1
    house.relief.keep_out(2)
    assert await house.settled() == "ab"


async def test_who_was_asked_for_meanwhile_is_left_alone():
    house = await House("ab").open()
    house.relief.keep_out(1)
    assert await house.settled() == "b"
    await house.slots["a"].ready()
    house.relief.keep_out(0)
    assert await house.settled() == "ab"


async def test_who_does_not_fit_any_more_stays_away():
    house = await House("ab").open()
    house.relief.keep_out(1)
    assert await house.settled() == "b"
    house.hands.room = False
    house.relief.keep_out(0)
    assert await house.settled() == "b" and house.slots["a"].state == Absent()


@pytest.mark.parametrize(
    ("stats", "later_s", "possible"),
    [
        (WAITS, 0.0, True),
        (WAITS, LACKING_S, True),
        (WAITS, LACKING_S + 1, False),
        (FLOWS, 0.0, False),
    ],
)
async def test_there_is_something_to_gain_while_sequences_wait_for_memory(stats, later_s, possible):
    house = await House("ab").open()
    house.relief.observe(stats)
    house.now_s += later_s
    assert house.relief.possible == possible
    for slot in house.slots.values():
        slot.pin(True)
    assert not house.relief.possible
