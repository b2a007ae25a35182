"""One model's way into memory and out of it: every transition, and who waits for what."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import uvloop

from mlx_serving.catalog.lifecycle import (
    Absent,
    Broke,
    DrainBegan,
    Draining,
    Event,
    Failed,
    FetchBegan,
    Fetching,
    Gone,
    LoadBegan,
    Loaded,
    Loading,
    ModelSlot,
    NoRoom,
    Ready,
    State,
    after,
    status_of,
)
from mlx_serving.errors import ModelBroken, WorkerDied

BROKEN = ModelBroken("no such file")
STATES: list[State[str]] = [
    Absent(),
    Fetching(),
    Loading(),
    Ready("x"),
    Draining("x"),
    Failed(BROKEN),
]
EVENTS: dict[str, Event[str]] = {
    "fetch": FetchBegan(),
    "load": LoadBegan(),
    "loaded": Loaded("y"),
    "broke": Broke(BROKEN),
    "drain": DrainBegan(),
    "gone": Gone(),
}
NEXT = {
    ("absent", "fetch"): "fetching",
    ("fetching", "fetch"): "fetching",
    ("failed", "fetch"): "fetching",
    ("absent", "load"): "loading",
    ("fetching", "load"): "loading",
    ("loading", "load"): "loading",
    ("failed", "load"): "loading",
    ("loading", "loaded"): "ready",
    ("absent", "broke"): "failed",
    ("fetching", "broke"): "failed",
    ("loading", "broke"): "failed",
    ("failed", "broke"): "failed",
    ("ready", "drain"): "draining",
    **{(word, "gone"): "absent" for word, _ in map(status_of, STATES)},
}


def test_every_transition() -> None:
    for state in STATES:
        for name, event in EVENTS.items():
            wanted = NEXT.get((status_of(state)[0], name))
            if wanted is None:
                with pytest.raises(AssertionError):
                    after(state, event)
            else:
                assert status_of(after(state, event))[0] == wanted
    assert after(Loading(), Loaded("y")) == Ready("y")
    assert after(Ready("x"), DrainBegan()) == Draining("x")


class Hands:
    """Brings up what it is told to, when it is told to."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.go.set()
        self.error: Exception | None = None
        self.log: list[str] = []

    async def bring_up(self, slot: ModelSlot[Any], *, asked: bool) -> str:
        self.log.append("up")
        slot.enter(LoadBegan())
        await self.go.wait()
        if self.error is not None:
            raise self.error
        return f"model {self.log.count('up')}"

    async def take_down(self, slot: ModelSlot[Any]) -> None:
        assert not slot.users
        self.log.append("down")
        await asyncio.sleep(0)


@pytest.fixture
async def hands() -> Hands:
    return Hands()


def slot_of(hands: Hands, **more: Any) -> ModelSlot[str]:
    return ModelSlot("source", "m", (), hands, **more)


async def until(condition: Any) -> None:
    async with asyncio.timeout(120):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)


async def test_requests_share_one_load(hands: Hands) -> None:
    slot = slot_of(hands)
    hands.go.clear()
    waiting = [asyncio.create_task(slot.acquire()) for _ in range(5)]
    await until(lambda: slot.waiters == 5)
    hands.go.set()
    assert await asyncio.gather(*waiting) == ["model 1"] * 5
    assert (hands.log, slot.users, slot.waiters) == (["up"], 5, 0)


async def test_unloading_waits_for_its_requests_and_who_comes_later_for_the_next_load(
    hands: Hands,
) -> None:
    slot = slot_of(hands)
    for _ in range(2):
        await slot.acquire()
    leaving = slot.unload()
    await until(lambda: isinstance(slot.state, Draining))
    assert slot.unload() is leaving
    late = asyncio.create_task(slot.acquire())
    slot.release()
    await asyncio.sleep(0)
    assert hands.log == ["up"] and not leaving.done()
    slot.release()
    assert await late == "model 2"
    assert hands.log == ["up", "down", "up"]


async def test_unloading_what_is_loading_lets_it_arrive_first(hands: Hands) -> None:
    slot = slot_of(hands)
    hands.go.clear()
    slot.start()
    await until(lambda: hands.log)
    leaving = slot.unload()
    hands.go.set()
    await leaving
    assert (hands.log, slot.state) == (["up", "down"], Absent())


async def test_a_failure_is_everybodys_and_tried_again_once_forgiven(hands: Hands) -> None:
    slot = slot_of(hands)
    hands.error = BROKEN
    results = await asyncio.gather(*(slot.acquire() for _ in range(3)), return_exceptions=True)
    assert results == [BROKEN] * 3
    with pytest.raises(ModelBroken):
        await slot.acquire()
    assert hands.log == ["up"]
    hands.error = None
    slot.forgive()
    assert await slot.acquire() == "model 2"


async def test_who_forgives_an_adapter_forgives_its_model(hands: Hands) -> None:
    base = slot_of(hands)
    adapter = slot_of(hands, base=base)
    hands.error = BROKEN
    with pytest.raises(ModelBroken):
        await adapter.acquire()
    hands.error = None
    adapter.forgive()
    assert await adapter.acquire() == "model 3"


async def test_a_mistake_of_ours_is_a_failure_too(hands: Hands) -> None:
    slot = slot_of(hands)
    hands.error = RuntimeError("oops")
    with pytest.raises(ModelBroken, match="oops"):
        await slot.acquire()


async def test_without_room_and_unasked_it_stays_absent(hands: Hands) -> None:
    slot = slot_of(hands)
    hands.error = NoRoom()
    await slot.start(asked=False)
    assert slot.settled and slot.state == Absent()


async def test_a_worker_that_died_has_let_go_of_it(hands: Hands) -> None:
    slot = slot_of(hands)
    await slot.ready()

    async def fail(_: Any) -> None:
        raise WorkerDied("killed")

    hands.take_down = fail  # type: ignore[method-assign]
    await slot.unload()
    assert slot.state == Absent()


@pytest.mark.parametrize(
    ("configured_s", "asked_s", "pinned", "leaves"),
    [
        (-1, None, False, False),
        (0, None, False, True),
        (-1, 0, False, True),
        (0, -1, False, False),
        (0, None, True, False),
        (1000, None, False, False),
    ],
)
async def test_time_to_live(
    hands: Hands, configured_s: float, asked_s: float | None, pinned: bool, leaves: bool
) -> None:
    slot = slot_of(hands, keep_alive_s=configured_s, pinned=pinned)
    await slot.acquire()
    slot.release(asked_s)
    assert (slot.expires_in_s is not None) == (leaves or configured_s == 1000)
    if leaves:
        await until(lambda: "down" in hands.log)
    else:
        for _ in range(20):
            await asyncio.sleep(0)
        assert isinstance(slot.state, Ready)
    await slot.close()


def test_time_to_live_on_the_servers_event_loop(hands: Hands) -> None:
    async def story() -> None:
        slot = slot_of(hands, keep_alive_s=0)
        await slot.acquire()
        slot.release(None)
        assert slot.expires_in_s == 0.0
        await until(lambda: "down" in hands.log)
        await slot.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(story())


async def test_use_stops_the_clock_and_pinning_does(hands: Hands) -> None:
    slot = slot_of(hands, keep_alive_s=1000)
    await slot.ready()
    assert slot.expires_in_s is not None
    async with slot.use():
        assert slot.expires_in_s is None
    assert slot.expires_in_s is not None
    slot.pin(True)
    assert slot.expires_in_s is None
    slot.pin(False)
    assert slot.expires_in_s is not None
    await slot.close()
    assert slot.expires_in_s is None


async def test_closing_cuts_a_load_short(hands: Hands) -> None:
    slot = slot_of(hands)
    hands.go.clear()
    task = slot.start()
    await until(lambda: hands.log)
    await slot.close()
    assert task.cancelled() and slot.state == Absent()
