"""Several models in one worker under one budget, over real processes that run scripted models.

Weights are holes in files: as large as a test wants them, and nothing on the disk.
"""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import pytest

from mlx_serving import Engine, errors
from mlx_serving.telemetry import events

MIB = 1 << 20


@pytest.fixture
def weighing(scripted: Any) -> Any:
    """`weighing("a", 100)`: a scripted model of 100 MiB."""

    def make(name: str, mib: int, **script: Any) -> str:
        folder: Path = scripted(name=name, **{"mode": "hash"} | script)
        header = json.dumps(
            {"w": {"dtype": "U8", "shape": [mib * MIB], "data_offsets": [0, mib * MIB]}}
        )
        with (folder / "model.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header.encode())
            file.truncate(8 + len(header) + mib * MIB)
        return str(folder)

    return make


def states(engine: Engine) -> dict[str, str]:
    return {model.id: model.status for model in engine.gateway.models()}


async def until(condition: Any) -> None:
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.002)


async def test_as_many_as_fit_are_loaded_and_the_others_when_they_are_asked_for(weighing):
    models = [weighing(name, 100) for name in "abc"]
    async with Engine(models, memory_budget=300 * MIB) as engine:
        assert states(engine) == {"a": "ready", "b": "ready", "c": "absent"}
        assert engine.gateway.health()["status"] == "ready"
        unloaded = []
        engine.on(events.ModelUnloaded, lambda event: unloaded.append(event.model_id))
        answer = await engine.complete("x", model="c", max_tokens=4)
        assert answer.usage.completion_tokens == 4
        assert states(engine) == {"a": "absent", "b": "ready", "c": "ready"}
        assert unloaded == ["a"]


async def test_a_model_that_never_fits_is_refused_and_says_what_would_do(weighing):
    models = [weighing("a", 50), weighing("b", 400)]
    with pytest.raises(errors.ModelTooLarge, match=r"needs 451 MiB; memory_budget leaves 200"):
        async with Engine(models, memory_budget=200 * MIB):
            pass
    engine = Engine(models, memory_budget=200 * MIB)
    await engine.start(wait_ready=False)
    try:
        assert (await engine.complete("x", model="a", max_tokens=1)).usage.completion_tokens == 1
        with pytest.raises(errors.ModelTooLarge) as refused:
            await engine.complete("x", model="b", max_tokens=1)
        assert (refused.value.status, refused.value.param) == (400, "model")
        await until(lambda: engine.gateway.health()["status"] == "degraded")
        (reason,) = engine.gateway.health()["reasons"]
        assert "needs 451 MiB" in reason
    finally:
        await engine.stop()


async def test_other_streams_go_on_while_a_model_loads(weighing):
    models = [
        weighing("a", 10, step_delay_ms=1),
        weighing("b", 10, load_slices=50, load_slice_ms=5),
    ]
    async with Engine(models, memory_budget=1 << 30) as engine:
        await engine.gateway.unload("b")
        loading = asyncio.create_task(engine.gateway.load("b"))
        while_loading = 0
        while not loading.done():
            async for chunk in engine.generate("x", model="a", max_tokens=20):
                while_loading += 0 if loading.done() else len(chunk.token_ids)
        assert while_loading > 5
        await loading
        assert states(engine) == {"a": "ready", "b": "ready"}


async def test_who_asks_while_it_loads_shares_the_load(weighing):
    async with Engine(weighing("a", 10, load_slices=20, load_slice_ms=5)) as engine:
        await engine.gateway.unload("a")
        loads = []
        engine.on(events.ModelLoaded, lambda event: loads.append(event.model_id))
        answers = await engine.batch(["x"] * 8, max_tokens=3)
        assert len({answer.text for answer in answers}) >= 1 and loads == ["a"]


async def test_a_model_leaves_when_its_time_is_over_and_comes_back(weighing):
    async with Engine(weighing("a", 10), keep_alive_s=0.0) as engine:
        await until(lambda: states(engine) == {"a": "absent"})
        await engine.complete("x", max_tokens=2, keep_alive_s=1000)
        (model,) = engine.gateway.models()
        assert model.status == "ready" and 0 < model.expires_in_s <= 1000
        await engine.complete("x", max_tokens=2)
        await until(lambda: states(engine) == {"a": "absent"})


async def test_a_pinned_model_stays_and_others_take_turns_beside_it(weighing):
    models = [weighing(name, 100) for name in "abc"]
    async with Engine(models, memory_budget=300 * MIB, pin=("a",)) as engine:
        for name in "bcb":
            await engine.complete("x", model=name, max_tokens=2)
            assert states(engine)["a"] == "ready" and states(engine)[name] == "ready"
        engine.gateway.pin("a", False)
        engine.gateway.pin("b", True)
        await engine.complete("x", model="c", max_tokens=2)
        assert states(engine) == {"a": "absent", "b": "ready", "c": "ready"}


def test_a_pin_names_a_served_model(weighing):
    with pytest.raises(errors.ConfigError, match="names no served model"):
        Engine(weighing("a", 1), pin=("b",))


async def mixed(engine: Engine, requests: int, seed: int) -> list[tuple[str, str]]:
    """Clients that each ask now this model, now that one: (the request, its answer) of all."""
    rng = random.Random(seed)
    wishes = [
        (rng.choice("abc"), f"{rng.randrange(50)}", rng.randint(1, 24)) for _ in range(requests)
    ]
    answers = []

    async def client(share: list[tuple[str, str, int]]) -> None:
        for model, prompt, tokens in share:
            answer = await engine.complete(prompt, model=model, max_tokens=tokens, seed=7)
            answers.append((f"{model} {prompt} {tokens}", answer.text))

    await asyncio.gather(*(client(wishes[i::8]) for i in range(8)))
    return answers


async def hold_two_of_three(weighing: Any, requests: int) -> None:
    """Every answer as a server of that model alone gives it; never more in memory than fits."""
    models = [weighing(name, 100, step_delay_ms=0.2) for name in "abc"]
    alone: dict[str, str] = {}
    async with Engine(models, memory_budget=1 << 30) as engine:
        alone.update(await mixed(engine, requests, seed=1))
    held: set[str] = set()
    log: list[str] = []

    def came(event: events.ModelLoaded) -> None:
        held.add(event.model_id)
        log.append(event.model_id)
        assert len(held) <= 2

    async with Engine(models, memory_budget=300 * MIB) as engine:
        held.update(name for name, state in states(engine).items() if state == "ready")
        engine.on(events.ModelLoaded, came)
        engine.on(events.ModelUnloaded, lambda event: held.discard(event.model_id))
        answers = await mixed(engine, requests, seed=1)
        assert engine.gateway.health()["status"] == "ready"
    assert len(answers) == requests
    assert all(alone[wish] == text for wish, text in answers)
    assert log, "nobody ever had to leave"


async def test_three_models_in_a_budget_for_two(weighing):
    await hold_two_of_three(weighing, 60)


@pytest.mark.slow
async def test_three_models_in_a_budget_for_two_over_five_hundred_requests(weighing):
    await hold_two_of_three(weighing, 500)


async def test_a_violated_level_has_an_idle_model_leave_for_sequences_that_wait_for_memory(
    weighing,
):
    kv = 64 * 1024
    models = [weighing(name, 100, context=4096, kv_bytes_per_token=kv) for name in "ab"]
    slo = {"slo": ["ttft p50 < 0.001ms"], "slo_remedies": ["evict_idle"]}
    async with Engine(models, memory_budget=424 * MIB, prefix_cache_bytes=0, **slo) as engine:
        assert states(engine) == {"a": "ready", "b": "ready"}
        engine.gateway.relief.idle_s = 0.0
        while states(engine)["b"] == "ready":
            crowd = [engine.complete("x", model="a", max_tokens=40, seed=1) for _ in range(32)]
            assert len({answer.text for answer in await asyncio.gather(*crowd)}) == 1
        assert engine.gateway.health()["slos"][0]["remedies"] == ["evict_idle"]
        answer = await engine.complete("x", model="b", max_tokens=4)
        assert answer.usage.completion_tokens == 4


async def test_requests_of_two_models_share_what_the_weights_leave(weighing):
    """Some fourteen short sequences fit beside the weights: who does not fit waits. A long one does not
    fit beside both models: the one that nobody uses leaves."""
    kv = 64 * 1024
    models = [weighing(name, 100, context=4096, kv_bytes_per_token=kv) for name in "ab"]
    async with Engine(models, memory_budget=1 << 40, prefix_cache_bytes=0) as engine:
        alone = {n: await engine.complete("x", model=n, max_tokens=40, seed=1) for n in "ab"}
    async with Engine(models, memory_budget=424 * MIB, prefix_cache_bytes=0) as engine:
        assert states(engine) == {"a": "ready", "b": "ready"}
        asked = [
            engine.complete("x", model=n, max_tokens=40, seed=1) for n in "ab" for _ in range(32)
        ]
        answers = await asyncio.gather(*asked)
        assert {answer.text for answer in answers} == {answer.text for answer in alone.values()}
        long = await engine.complete("y" * 4000, model="b", max_tokens=96, seed=1)
        assert long.usage.completion_tokens == 96
        assert states(engine) == {"a": "absent", "b": "ready"}


async def test_a_model_that_usually_comes_next_is_loaded_ahead(weighing):
    models = [weighing(name, 100) for name in "abc"]
    async with Engine(models, memory_budget=300 * MIB, prefetch=0.7) as engine:
        for name in "abc" * 4:
            await engine.complete("x", model=name, max_tokens=1)
        metrics = engine.gateway.metrics().decode()
        # Two fit: the next of three is there only where it was loaded ahead, for which an idle one left.
        ahead, pause_s = False, 0.02
        while not ahead:
            pause_s *= 2  # a slow machine takes longer over a load
            for name, then in ("ab", "bc", "ca"):
                await engine.complete("x", model=name, max_tokens=1)
                await asyncio.sleep(pause_s)
                ahead = ahead or states(engine)[then] == "ready"
    for outcome in ("begun", "hit", "miss"):
        assert f'mlx_serving_prefetches_total{{outcome="{outcome}"}}' in metrics, outcome
