"""Feature flags through the engine, over a real worker process that runs scripted models."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_serving import Engine
from mlx_serving.errors import ConfigError, InvalidRequest
from mlx_serving.traffic.rollout import Stage
from mlx_serving.traffic.rollouts import Spec
from mlx_serving.types import GenerateRequest, SamplingParams, TextPrompt


async def ask(engine: Engine, key: str, model: str = "old", **fields):
    """(text, tokens, model that answered in place, flags)."""
    generation = await engine.gateway.open(
        GenerateRequest(
            request_id=f"r-{key}",
            model=model,
            prompt=TextPrompt(text="Hello"),
            sampling=SamplingParams(temperature=0.0),
            session=key,
            **{"max_tokens": 4, **fields},
        )
    )
    text, tokens = "", 0
    async for events in generation:
        text += "".join(event.text for event in events)
        tokens += sum(len(event.token_ids) for event in events)
    return text[:1], tokens, generation.variant, generation.flags


@pytest.fixture
def models(scripted) -> list[str]:
    return [
        str(scripted(name=name, text=letter * 40)) for name, letter in (("old", "a"), ("new", "b"))
    ]


async def test_a_share_is_answered_by_another_entry_and_users_stay(models):
    flags = ["fast=50% model=old use=new", "brief=100% max_tokens=2"]
    async with Engine(models, feature_flags=flags) as engine:
        users = [f"user-{i}" for i in range(12)]
        found = {user: await ask(engine, user) for user in users}
        assert {text for text, *_ in found.values()} == {"a", "b"}
        for text, tokens, variant, on in found.values():
            assert tokens == 4  # the request says
            assert (text, variant, "fast" in on) in (("a", None, False), ("b", "new", True))
        assert (await ask(engine, users[0], max_tokens=None))[1] == 2
        await engine.gateway.live.change({"feature_flags": ["fast=75% model=old use=new"]})
        more = {user: await ask(engine, user) for user in users}
        was, now = ({u for u in users if f[u][0] == "b"} for f in (found, more))
        assert was <= now
        await engine.gateway.live.change({"feature_flags": []})
        assert {(await ask(engine, user))[0] for user in users} == {"a"}
        shown = engine.gateway.metrics().decode()
        assert 'mlx_serving_flagged_requests_total{flag="fast",state="on"}' in shown
        assert 'mlx_serving_flagged_requests_total{flag="brief",state="off"}' not in shown


async def test_a_rollout_of_the_entry_that_a_flag_leads_to(models):
    async with Engine(models, feature_flags=["fast=100% model=old use=new"]) as engine:
        spec = Spec(name="c", model="new", variant="old", mode="ab", stages=(Stage(1.0),))
        engine.gateway.start_rollout(spec)
        assert await ask(engine, "u") == ("a", 4, None, ("fast",))
        assert await ask(engine, "u", model="new") == ("a", 4, "old", ())


async def test_an_entry_that_cannot_answer_costs_nobody_an_answer(models):
    (Path(models[1]) / "config.json").write_text("{broken")
    engine = Engine(models, feature_flags=["fast=100% model=old use=new"])
    await engine.start(wait_ready=False)
    try:
        assert await ask(engine, "u") == ("a", 4, None, ("fast",))
    finally:
        await engine.stop()


async def test_wrong_flags_are_named_and_change_nothing(models):
    with pytest.raises(ConfigError, match="'nobody'"):
        async with Engine(models, feature_flags=["fast=1% use=nobody"]):
            pass
    async with Engine(models, feature_flags=["fast=100% model=old use=new"]) as engine:
        for wrong in ("fast=1% use=nobody", "fast=1%", "?"):
            with pytest.raises(InvalidRequest) as caught:
                await engine.gateway.live.change({"feature_flags": [wrong]})
            assert caught.value.param == "feature_flags"
        assert (await ask(engine, "u"))[3] == ("fast",)
