"""Rollouts through the engine, over a real worker process that runs scripted models."""

from __future__ import annotations

import asyncio

import pytest

from mlx_serving import Engine
from mlx_serving.errors import ModelNotFound
from mlx_serving.traffic.rollout import Stage
from mlx_serving.traffic.rollouts import Spec
from mlx_serving.traffic.stats import Moments
from mlx_serving.types import GenerateRequest, SamplingParams, TextPrompt

STAGES = (Stage(0.5, min_samples=30, min_s=0), Stage(1.0, min_samples=10, min_s=0))
QUALITY = ("error", "empty")
"""What a loaded machine does not change."""


def request(number: int, model: str = "old", **fields) -> GenerateRequest:
    return GenerateRequest(
        request_id=f"r{number}",
        model=model,
        prompt=TextPrompt(text="Hello"),
        sampling=SamplingParams(temperature=0.0),
        max_tokens=6,
        **fields,
    )


async def ask(engine: Engine, number: int, **fields) -> tuple[str, str | None]:
    generation = await engine.gateway.open(request(number, **fields))
    text = ""
    async for events in generation:
        text += "".join(event.text for event in events)
    return text, generation.variant


def spec(**fields) -> Spec:
    return Spec(
        **{
            "name": "c",
            "model": "old",
            "variant": "new",
            "stages": STAGES,
            "metrics": QUALITY,
            **fields,
        }
    )


async def until(condition) -> None:
    while not condition():  # noqa: ASYNC110 - nothing signals it
        await asyncio.sleep(0.005)


def compared(engine: Engine) -> tuple[Moments, Moments]:
    """How much the copies' answers differed, beside the originals' zeros."""
    return next(iter(engine.gateway.rollouts.get("c").figures.of("disagreement")), (Moments(),) * 2)


async def serve(engine: Engine, count: int, *, at_once: int = 8) -> list[tuple[str, str | None]]:
    found = []
    for start in range(0, count, at_once):
        numbers = range(start, min(start + at_once, count))
        found += await asyncio.gather(*(ask(engine, n) for n in numbers))
    return found


async def test_a_good_variant_is_promoted_and_a_user_stays_put(scripted):
    old, new = scripted(name="old", text="a" * 40), scripted(name="new", text="b" * 40)
    async with Engine([str(old), str(new)]) as engine:
        engine.gateway.start_rollout(spec())
        mine = {await ask(engine, n, session="me") for n in range(8)}
        assert len(mine) == 1
        found = await serve(engine, 40)
        assert {text for text, variant in found if variant == "new"} == {"b" * 6}
        assert {text for text, variant in found if variant is None} == {"a" * 6}
        await serve(engine, 200)
        assert engine.gateway.rollouts.get("c").status == "promoted"
        shown = 'mlx_serving_rollout_share{model="old",rollout="c",variant="new"}'
        assert f"{shown} 1.0" in engine.metrics.render().decode()
        assert await ask(engine, 1) == ("b" * 6, "new")
        assert await ask(engine, 1, model="new") == ("b" * 6, None)
        engine.gateway.rollouts.remove("c")
        assert "mlx_serving_rollout_share{" not in engine.metrics.render().decode()


async def test_a_variant_that_cannot_be_loaded_costs_no_client_an_answer(scripted):
    old, new = scripted(name="old", text="a" * 40), scripted(name="new", text="b" * 40)
    (new / "config.json").write_text("{broken")
    engine = Engine([str(old), str(new)])
    await engine.start(wait_ready=False)
    try:
        await engine.gateway.load("old")
        engine.gateway.start_rollout(spec())
        assert set(await serve(engine, 150)) == {("a" * 6, None)}
        found = engine.gateway.rollouts.get("c")
        assert found.status == "rolled_back" and "error" in found.last
    finally:
        await engine.stop()


async def test_an_empty_variant_is_rolled_back(scripted):
    old = scripted(name="old", text="a" * 40)
    new = scripted(name="new", text="<|end|>" * 3)
    async with Engine([str(old), str(new)]) as engine:
        engine.gateway.start_rollout(spec())
        await serve(engine, 150)
        found = engine.gateway.rollouts.get("c")
        assert found.status == "rolled_back" and "empty" in found.last
        assert (await ask(engine, 3))[1] is None


async def test_a_stream_of_the_variant_outlives_its_rollback(scripted):
    old = scripted(name="old", text="a" * 40)
    new = scripted(name="new", text="b" * 400, step_delay_ms=1)
    async with Engine([str(old), str(new)]) as engine:
        engine.gateway.start_rollout(spec(stages=(Stage(1.0, min_samples=10_000),)))
        stream = engine.generate("Hello", model="old", max_tokens=300, temperature=0)
        text = (await anext(stream)).text
        engine.gateway.rollouts.roll_back("c")
        assert await ask(engine, 1) == ("a" * 6, None)
        async for chunk in stream:
            text += chunk.text
        assert text == "b" * 300


async def test_a_shadow_is_compared_and_not_seen(scripted):
    old, new = scripted(name="old", text="abcdef"), scripted(name="new", text="abcxyz")
    async with Engine([str(old), str(new)]) as engine:
        engine.gateway.start_rollout(spec(mode="shadow", stages=(Stage(1.0),), metrics=None))
        for n in range(25):
            assert await ask(engine, n) == ("abcdef", None)
            await until(lambda n=n: compared(engine)[1].n == n + 1)
        assert [m.mean for m in compared(engine)] == [0.0, pytest.approx(0.5)]


async def test_a_copy_is_not_copied_and_promised_to_nobody(scripted):
    old, new = scripted(name="old", text="abcdef"), scripted(name="new", text="abcxyz")
    async with Engine([str(old), str(new)], slo=["ttft p50 < 0.001ms model=new"]) as engine:
        shadow = {"mode": "shadow", "stages": (Stage(1.0),), "metrics": None}
        engine.gateway.start_rollout(spec(**shadow))
        engine.gateway.start_rollout(spec(name="back", model="new", variant="old", **shadow))
        for n in range(12):
            assert await ask(engine, n) == ("abcdef", None)
            await until(lambda n=n: compared(engine)[1].n == n + 1)
        await until(lambda: engine.gateway.health()["open_requests"] == 0)
        asked = [(model, ended(engine, model)) for model in ("old", "new")]
        assert asked == [("old", 12), ("new", 12)]
        (level,) = engine.gateway.health()["slos"]
        assert (level["state"], level["burn_short"]) == ("ok", 0.0)


def ended(engine: Engine, model: str) -> float:
    return engine.metrics.requests.labels(model, "length")._value.get()


async def test_a_copy_that_is_not_let_in_is_counted(scripted):
    old, new = scripted(name="old", text="abc"), scripted(name="new", text="abc")
    async with Engine([str(old), str(new)], class_queue=("low=0",)) as engine:
        engine.gateway.start_rollout(spec(mode="shadow", stages=(Stage(1.0),), metrics=None))
        assert await ask(engine, 1) == ("abc", None)
        await until(lambda: engine.metrics.shadows_skipped._value.get() == 1)
        assert compared(engine)[1].n == 0


async def test_a_copy_of_a_forced_call_is_compared_too(scripted):
    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    old, new = (scripted(name=name, text=call, context=4096) for name in ("old", "new"))
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    async with Engine([str(old), str(new)]) as engine:
        engine.gateway.start_rollout(spec(mode="shadow", stages=(Stage(1.0),), metrics=None))
        await engine.chat("Hello", tools=[tool], tool_choice="required", max_tokens=60)
        await until(lambda: compared(engine)[1].n == 1)


async def test_both_models_must_be_served(scripted):
    async with Engine(str(scripted(name="old", text="a"))) as engine:
        with pytest.raises(ModelNotFound) as caught:
            engine.gateway.start_rollout(spec())
        assert caught.value.param == "variant"
