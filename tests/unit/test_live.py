"""Settings that change while requests run: over no engine, then over one that runs scripted models."""

from __future__ import annotations

import asyncio
import logging

import pytest

from mlx_serving import Engine
from mlx_serving.config import FIELDS, Config
from mlx_serving.errors import ConfigError, InvalidRequest, ModelNotFound, Overloaded
from mlx_serving.live import HIDDEN, LIVE, LiveSettings


def settings(config: Config | None = None, **more) -> tuple[LiveSettings, list[Config]]:
    taken: list[Config] = []

    def prepare(wanted: Config):
        if "none" in wanted.slo:
            raise ConfigError("slo: 'none' is none", param="slo")

        async def apply() -> None:
            taken.append(wanted)

        return apply

    live = LiveSettings(config or Config(), **more)
    live.own(prepare)
    return live, taken


def test_what_is_named_is_a_setting():
    assert FIELDS.keys() >= LIVE and FIELDS.keys() >= HIDDEN


@pytest.mark.parametrize(
    ("values", "param", "code"),
    [
        ({"max_queu": 3}, "max_queu", "invalid_value"),
        ({"max_queue": 0}, "max_queue", "invalid_config"),
        ({"max_queue": "3 or so"}, "max_queue", "invalid_config"),
        ({"max_queue": 3, "max_tokens": -1}, "max_tokens", "invalid_config"),
        ({"max_queue": 3, "port": 9}, "port", "needs_restart"),
        ({"max_queue": 3, "kernels": "off"}, "kernels", "needs_restart"),
        ({"max_queue": 3, "slo": ["none"]}, "slo", "invalid_config"),
        ({"class_queue": ["urgent=3"]}, "class_queue", "invalid_config"),
    ],
)
async def test_all_or_none(values, param, code):
    live, taken = settings()
    with pytest.raises(InvalidRequest) as caught:
        await live.change(values)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert taken == [] and live.config == Config()


async def test_what_changes_is_told():
    live, taken = settings()
    change = await live.change({"max_queue": 3, "port": 8000, "slo": ["errors < 1%"]})
    assert change.applied == {"max_queue": 3, "slo": ("errors < 1%",)}
    assert change.needs_restart == ()
    assert taken == [live.config] and live.config.max_queue == 3
    assert (await live.change({"max_queue": 3})).applied == {} and len(taken) == 1


async def test_secrets_are_not_shown():
    live, _ = settings(Config(alert_webhook="https://hooks.example.org/secret", admin_key="k"))
    shown = live.shown()
    assert shown.keys() == FIELDS.keys()
    assert shown["alert_webhook"] == shown["admin_key"] == "(not shown)"
    assert shown["api_key"] == () and "secret" not in str(shown)
    change = await live.change({"alert_webhook": "https://hooks.example.org/another"})
    assert change.applied == {"alert_webhook": "(not shown)"}


async def test_a_reload_takes_over_what_it_can_and_names_the_rest():
    live, taken = settings(Config(max_queue=5), read=lambda: Config(max_tokens=7, port=9))
    change = await live.reload()
    assert change.applied == {"max_queue": 1024, "max_tokens": 7}
    assert change.needs_restart == ("port",)
    assert taken == [Config(max_tokens=7)] == [live.config]


async def test_a_reload_of_what_is_wrong_changes_nothing():
    def read() -> Config:
        raise ConfigError("serve.yaml:3: max_queue: must be >= 1, got 0", param="serve.yaml:3")

    live, taken = settings(read=read)
    with pytest.raises(InvalidRequest, match=r"serve\.yaml:3: max_queue"):
        await live.reload()
    live.read = lambda: Config(max_queue=3, slo=("none",))
    with pytest.raises(InvalidRequest, match="none"):
        await live.reload()
    assert taken == []
    live.read = None
    with pytest.raises(InvalidRequest, match="came from code"):
        await live.reload()


# ------------------------------------------------------------------- over an engine


async def test_requests_that_come_later_have_the_new_settings_and_streams_go_on(scripted):
    model = str(scripted(text="a" * 4000, step_delay_ms=1))
    async with Engine(model, max_num_seqs=4) as engine:
        live = engine.gateway.live
        stream = engine.generate("Hello", max_tokens=200)
        got = (await anext(stream)).text
        change = await live.change(
            {"max_tokens": 3, "max_queue": 1, "concurrency_limit": 1, "keep_alive_s": 600.0}
        )
        assert change.applied.keys() == {
            "max_tokens",
            "max_queue",
            "concurrency_limit",
            "keep_alive_s",
        }
        with pytest.raises(Overloaded):
            await engine.complete("Hello")
        async for chunk in stream:
            got += chunk.text
        assert got == "a" * 200
        assert (await engine.complete("Hello")).text == "aaa"
        (row,) = engine.gateway.health()["ceilings"]
        assert (row["guard"], row["concurrency"]) == ("bypassed", 1)
        await live.change({"concurrency_limit": None})
        assert "ceilings" not in engine.gateway.health()


async def test_a_response_cache_comes_and_goes(scripted):
    async with Engine(str(scripted(text="a" * 40))) as engine:
        live, lookups = engine.gateway.live, engine.metrics.cache_lookups.labels("hit")

        async def hits() -> float:
            for _ in range(2):
                done = await engine.complete("Hello", max_tokens=4, temperature=0)
                assert done.text == "aaaa"
                await asyncio.sleep(0)
            return lookups._value.get()

        assert await hits() == 0
        await live.change({"response_cache": "memory"})
        while not await hits():
            pass
        await live.change({"response_cache_entries": 1, "coalesce": "deterministic"})
        await live.change({"response_cache": "off"})
        before = await hits()
        assert await hits() == before


async def test_levels_are_watched_from_then_on_and_what_was_done_is_undone(scripted):
    # Tokens have to come apart to have a time between them.
    async with Engine(str(scripted(text="a" * 40, step_delay_ms=5))) as engine:
        live, health = engine.gateway.live, engine.gateway.health
        await live.change({"slo": ["tpot p50 < 0.0001ms"], "slo_remedies": ["smaller_chunks"]})
        while "ceilings" not in health():
            await engine.complete("Hello", max_tokens=20)
        with pytest.raises(InvalidRequest) as caught:
            await live.change({"slo": ["tpot soon"]})
        assert caught.value.param == "slo" and "ceilings" in health()
        await live.change({"slo": []})
        assert engine.gateway.watch is None
        assert "ceilings" not in health() and "slos" not in health()
        assert "mlx_serving_slo_violated{" not in engine.metrics.render().decode()


async def test_drifts_are_told_what_changed(scripted):
    async with Engine(str(scripted(text="a")), watch_drift=True) as engine:
        await engine.gateway.live.change({"max_queue": 3, "usual_num_seqs": 2})
        watch = engine.gateway.watch
        assert watch is not None and watch._drifts is not None
        assert watch._drifts._marks[-1][1] == "usual_num_seqs, max_queue changed"


async def test_a_model_s_own_time_in_memory_stays_its_own(scripted):
    models = [str(scripted(name="a")), {"model": str(scripted(name="b")), "keep_alive_s": 7}]
    async with Engine(models) as engine:
        await engine.gateway.live.change({"keep_alive_s": 600.0})
        left = {model.id: model.expires_in_s for model in engine.gateway.models()}
        for name in left:
            await engine.gateway.load(name)
        left = {model.id: model.expires_in_s for model in engine.gateway.models()}
        assert left["a"] > 500 and left["b"] <= 7


async def test_pins_follow_their_setting_and_leave_others_alone(scripted):
    models = [str(scripted(name=name)) for name in "abc"] + [
        {"model": str(scripted(name="d")), "pinned": True}
    ]
    async with Engine(models, pin=["a"]) as engine:
        gateway = engine.gateway

        def pinned() -> str:
            return "".join(m.id for m in gateway.models() if m.pinned)

        assert pinned() == "ad"
        gateway.pin("c", True)
        await gateway.live.change({"pin": ["a", "b"]})
        assert pinned() == "abcd"
        with pytest.raises(InvalidRequest, match="'x' names no served model"):
            await gateway.live.change({"pin": ["x"]})
        await gateway.live.change({"pin": []})
        assert pinned() == "cd"
        while gateway.models()[3].not_wired is None:  # the worker has answered  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert "no weights" in gateway.models()[3].not_wired
        assert gateway.models()[0].not_wired is None


async def test_more_names_come_and_go(scripted):
    async with Engine(str(scripted(name="a")), model_aliases=["claude-*"]) as engine:
        gateway = engine.gateway
        assert gateway.model_id("claude-x") == "a"
        with pytest.raises(InvalidRequest, match="'gpt=z' names no served model"):
            await gateway.live.change({"model_aliases": ["gpt=z"]})
        await gateway.live.change({"model_aliases": ["gpt-4", "gpt-5=a"]})
        assert gateway.model_id("gpt-4") == gateway.model_id("gpt-5") == "a"
        with pytest.raises(ModelNotFound):
            gateway.model_id("claude-x")


async def test_the_log_gets_more_or_less(scripted):
    ours = logging.getLogger("mlx_serving")
    before = ours.level
    try:
        async with Engine(str(scripted(text="a"))) as engine:
            await engine.gateway.live.change({"log_level": "debug"})
            assert ours.isEnabledFor(logging.DEBUG)
            await engine.gateway.live.change({"log_level": "error"})
            assert not ours.isEnabledFor(logging.WARNING)
    finally:
        ours.setLevel(before)
