"""Service levels through the engine, over a real worker process that runs scripted models."""

from __future__ import annotations

import asyncio

import pytest

from mlx_serving import Engine
from mlx_serving.errors import ConfigError, Overloaded
from mlx_serving.traffic.alerts import Alerts
from mlx_serving.traffic.rollout import Stage
from mlx_serving.traffic.rollouts import Spec
from mlx_serving.types import Priority


async def ask(engine: Engine, **fields) -> str:
    return (await engine.complete("Hello", max_tokens=4, temperature=0, **fields)).text


async def until(condition) -> None:
    while not condition():  # noqa: ASYNC110 - time passes, and nothing signals it
        await asyncio.sleep(0.02)


async def test_a_promise_that_cannot_be_kept_ends_the_canary(scripted):
    old, new = scripted(name="old", text="a" * 40), scripted(name="new", text="b" * 40)
    settings = {"slo": ["ttft p50 < 0.001ms over=60s,120s"], "slo_remedies": ["roll_back"]}
    async with Engine([str(old), str(new)], **settings) as engine:
        stages = (Stage(0.5, min_samples=10_000),)
        spec = Spec(name="c", model="old", variant="new", stages=stages)
        engine.gateway.start_rollout(spec)
        for _ in range(12):
            await ask(engine)
        (level,) = engine.gateway.health()["slos"]
        assert level["burn_short"] == 2.0
        await until(lambda: engine.gateway.rollouts.get("c").status == "rolled_back")
        assert "for a service level" in engine.gateway.rollouts.get("c").last
        (level,) = engine.gateway.health()["slos"]
        assert level["state"] == "violated" and level["remedies"] == ["roll_back"]
        shown = engine.metrics.render().decode()
        assert 'mlx_serving_remedies_total{act="applied",remedy="roll_back"} 1.0' in shown


async def test_low_requests_are_refused_until_the_others_are_served_as_promised(scripted):
    settings = {"slo": ["ttft p50 < 0.001ms"], "slo_remedies": ["shed_low"]}
    async with Engine(str(scripted(text="a" * 40)), **settings) as engine:
        assert await ask(engine, priority=Priority.LOW) == "aaaa"
        for _ in range(12):
            await ask(engine)
        await until(lambda: engine.gateway.health()["slos"][0]["remedies"])
        with pytest.raises(Overloaded) as caught:
            await ask(engine, priority=Priority.LOW)
        assert caught.value.code == "shed" and caught.value.retry_after_s
        shed = engine.metrics.refused.labels("scripted", "low", "shed")
        assert shed._value.get() == 1
        assert await ask(engine) == "aaaa"


async def test_who_was_told_of_a_violation_is_told_when_nobody_watches_any_more(scripted):
    told: list[object] = []
    async with Engine(str(scripted(text="a" * 40)), slo=["ttft p50 < 0.001ms"]) as engine:
        watch = engine.gateway.watch
        assert watch is not None
        watch._alerts = Alerts("http://x", "json", noting(told), group_s=1000.0)
        for _ in range(12):
            await ask(engine)
        await until(lambda: engine.gateway.health()["slos"][0]["state"] == "violated")
        await engine.gateway.live.change({"slo": []})
    (message,) = told
    states = [(change["before"], change["state"]) for change in message["changes"]]
    assert states[-1] == ("violated", "unwatched")
    assert message["changes"][-1]["status"] == "resolved"


def noting(told: list[object]):
    async def post(url: str, payload: object) -> int:
        told.append(payload)
        return 200

    return post


async def test_a_dry_run_refuses_nobody(scripted):
    settings = {"slo": ["ttft p50 < 0.001ms"], "slo_remedies": ["shed_low"], "slo_dry_run": True}
    async with Engine(str(scripted(text="a" * 40)), **settings) as engine:
        for _ in range(12):
            await ask(engine)
        await until(lambda: engine.gateway.health()["slos"][0]["remedies"])
        assert await ask(engine, priority=Priority.LOW) == "aaaa"


async def test_what_is_not_watched_is_not_shown(scripted):
    async with Engine(str(scripted(text="a"))) as engine:
        assert engine.gateway.watch is None
        assert "slos" not in engine.gateway.health()


async def test_a_promise_that_is_none_is_refused_at_the_start(scripted):
    with pytest.raises(ConfigError) as caught:
        Engine(str(scripted(text="a")), slo=["ttft fast"])
    assert caught.value.param == "slo"


async def test_a_violated_level_changes_what_the_worker_takes_on(scripted):
    settings = {"slo": ["tpot p50 < 0.0001ms"], "slo_remedies": ["smaller_chunks", "lower_ceiling"]}
    # Tokens have to come apart to have a time between them.
    model = str(scripted(text="a" * 40, step_delay_ms=5))
    async with Engine(model, max_num_seqs=4, **settings) as engine:

        async def violated() -> bool:
            done = await engine.complete("Hello", max_tokens=20, temperature=0)
            assert done.text == "a" * 20
            return "ceilings" in engine.gateway.health()

        while not await violated():
            pass
        (row,) = engine.gateway.health()["ceilings"]
        assert row["prefill_tokens"] < 512 and row["concurrency"] == 4
        assert await ask(engine) == "aaaa"


async def test_a_limit_by_hand_is_kept_by_the_worker_and_told(scripted):
    seen = []
    async with Engine(str(scripted(text="a" * 400)), concurrency_limit=2) as engine:
        tell = engine._worker.on_stats
        engine._worker.on_stats = lambda stats: (seen.append(stats.running), tell(stats))
        many = [engine.complete("Hello", max_tokens=60, seed=i) for i in range(6)]
        assert {len(one.text) for one in await asyncio.gather(*many)} == {60}
        (row,) = engine.gateway.health()["ceilings"]
        assert (row["guard"], row["concurrency"]) == ("bypassed", 2)
    assert 1 <= max(seen) <= 2


async def test_slow_steps_lower_the_ceiling_and_no_stream_ends(scripted):
    model = str(scripted(text="a" * 400, step_delay_ms=2))
    async with Engine(model, max_num_seqs=8, step_limit_ms=0.001) as engine:

        async def keep_busy(seed: int) -> None:
            while True:
                done = await engine.complete("Hello", max_tokens=300, seed=seed)
                assert done.text == "a" * 300

        streams = [asyncio.create_task(keep_busy(seed)) for seed in range(8)]
        await until(lambda: engine.gateway.health()["ceilings"][0]["guard"] == "degraded")
        assert engine.gateway.health()["ceilings"][0]["concurrency"] < 8
        assert not any(stream.done() for stream in streams)
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)


async def test_drift_is_watched_when_asked_for(scripted, tmp_path):
    settings = {"watch_drift": True, "baselines_file": str(tmp_path / "b.json")}
    async with Engine(str(scripted(text="a" * 40)), **settings) as engine:
        await ask(engine)
        assert engine.gateway.health()["drifts"] == []
