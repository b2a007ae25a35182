"""Slots that share a budget: who comes in, who has to leave, who waits."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from mlx_serving.catalog.lifecycle import Absent, Draining, LoadBegan, ModelSlot, NoRoom, Ready
from mlx_serving.catalog.residency import Residency
from mlx_serving.errors import ModelTooLarge, Overloaded


class House:
    """Models of given sizes in a budget, with hands that only ask for room."""

    def __init__(self, budget: int, sizes: dict[str, int], **settings: Any) -> None:
        settings = {"wait_s": 30.0, "patience_s": 0.01} | settings
        self.residency = Residency(budget, **settings)
        self.sizes = sizes
        self.measured = dict(sizes)
        self.log: list[str] = []
        self.slots = {name: ModelSlot(name, name, (), self) for name in sizes}
        self.residency.watch(list(self.slots.values()))

    async def bring_up(self, slot: ModelSlot[Any], *, asked: bool) -> str:
        name = slot.model_id
        try:
            await self.residency.make_room(slot, self.sizes[name], asked=asked)
        except BaseException:
            self.residency.gone(name)
            raise
        assert self.residency.held_bytes <= self.residency.budget_bytes
        slot.enter(LoadBegan())
        await asyncio.sleep(0)
        self.log.append(f"+{name}")
        self.residency.loaded(name, self.measured[name])
        return name

    async def take_down(self, slot: ModelSlot[Any]) -> None:
        await asyncio.sleep(0)
        self.log.append(f"-{slot.model_id}")
        self.residency.gone(slot.model_id)


async def test_the_least_recently_used_idle_model_leaves() -> None:
    house = House(10, {"a": 5, "b": 5, "c": 5})
    for name in "abca":
        await house.slots[name].ready()
    assert house.log == ["+a", "+b", "-a", "+c", "-b", "+a"]


async def test_a_busy_model_leaves_only_after_its_requests() -> None:
    house = House(10, {"a": 5, "b": 5, "c": 5})
    for name in "ab":
        await house.slots[name].acquire()
    coming = asyncio.create_task(house.slots["c"].ready())
    while not any(isinstance(s.state, Draining) for s in house.slots.values()):  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    assert house.log == ["+a", "+b"] and not coming.done()
    house.slots["a"].release()
    assert await coming == "c"
    assert house.log == ["+a", "+b", "-a", "+c"]


async def test_what_never_fits_is_told_what_would() -> None:
    house = House(10 << 20, {"a": 4 << 20, "b": 11 << 20, "c": 7 << 20})
    with pytest.raises(ModelTooLarge, match="needs 11 MiB; memory_budget leaves 10 MiB") as error:
        await house.slots["b"].ready()
    assert (error.value.status, error.value.param) == (400, "model")
    await house.slots["a"].ready()
    house.slots["a"].pin(True)
    with pytest.raises(ModelTooLarge, match="leaves 6 MiB beside the pinned a"):
        await house.slots["c"].ready()


async def test_who_does_not_fit_in_time_may_come_again() -> None:
    house = House(10, {"a": 10, "b": 10}, wait_s=0.05, patience_s=1000.0)
    await house.slots["a"].acquire()
    with pytest.raises(Overloaded) as error:
        await house.slots["b"].ready()
    assert error.value.retry_after_s and error.value.code == "no_memory_now"


@pytest.mark.parametrize(
    ("pinned", "busy", "spared", "log"),
    [
        ("", "", "b", ["-a"]),
        ("", "", "a", ["-b"]),
        ("", "a", "b", None),
        ("a", "", "b", None),
    ],
)
async def test_for_a_guess_idle_models_leave_but_the_present_one(
    pinned: str, busy: str, spared: str, log: list[str] | None
) -> None:
    house = House(10, {"a": 5, "b": 5, "c": 5})
    assert not await house.residency.clear_for(house.slots["c"], spared)  # of unknown size
    for name in "cab":
        await house.slots[name].ready()
    house.log.clear()
    for name in pinned:
        house.slots[name].pin(True)
    for name in busy:
        await house.slots[name].acquire()
    assert await house.residency.clear_for(house.slots["c"], spared) == (log is not None)
    assert house.log == (log or [])
    if log:
        assert await house.residency.clear_for(house.slots["c"], spared)
        await asyncio.wait([house.slots["c"].start(asked=False)])
        assert house.log == [*log, "+c"]


async def test_unasked_nobody_leaves_for_it() -> None:
    house = House(10, {"a": 10, "b": 10})
    await house.slots["a"].ready()
    with pytest.raises(NoRoom):
        await house.residency.make_room(house.slots["b"], 10, asked=False)
    await house.slots["b"].start(asked=False)
    assert house.slots["b"].state == Absent() and house.log == ["+a"]


async def test_what_was_measured_corrects_the_estimate() -> None:
    """Both estimates are too high by far: once known, both models stay."""
    house = House(10, {"a": 9, "b": 9})
    house.measured = {"a": 4, "b": 5}
    for name in "abab":
        await house.slots[name].ready()
    assert house.log == ["+a", "-a", "+b", "+a"]
    assert house.residency.held_bytes == 9
    assert (house.residency.need_of("a"), house.residency.need_of("c")) == (4, None)


async def test_idle_models_leave_for_the_requests_of_a_loaded_one() -> None:
    house = House(10, {"a": 4, "b": 3, "c": 3})
    for name in "abc":
        await house.slots[name].acquire()
    house.slots["b"].release()
    house.residency.relieve(2)
    while house.log[-1] != "-b":  # noqa: ASYNC110
        await asyncio.sleep(0)
    house.residency.relieve(2)  # nobody is idle any more
    for _ in range(20):
        await asyncio.sleep(0)
    assert house.log == ["+a", "+b", "+c", "-b"]


async def test_under_mixed_load_everybody_is_served_within_the_budget() -> None:
    house = House(10, {"a": 5, "b": 5, "c": 5, "d": 3}, patience_s=0.002)
    rng = random.Random(3)

    async def request(name: str) -> None:
        async with house.slots[name].use() as loaded:
            assert loaded == name
            for _ in range(rng.randint(1, 20)):
                assert isinstance(house.slots[name].state, Ready) or house.slots[name].users
                await asyncio.sleep(0)
            assert f"+{name}" in house.log

    async def client() -> None:
        for _ in range(25):
            await request(rng.choice("abcd"))

    await asyncio.gather(*(client() for _ in range(8)))
    held: set[str] = set()
    for entry in house.log:
        held ^= {entry[1:]}
        assert sum(house.sizes[name] for name in held) <= 10
    assert house.residency.evictions > 0
