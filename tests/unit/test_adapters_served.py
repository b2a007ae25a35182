"""Adapters beside scripted models, over real processes: names, lifecycle, memory, deaths."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from adapter_files import write_adapter
from mlx_serving import Engine, errors
from mlx_serving.telemetry import events
from mlx_serving.traffic.rollout import Stage
from mlx_serving.traffic.rollouts import Spec

MIB = 1 << 20


async def until(condition: Any) -> None:
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.002)


def states(engine: Engine) -> dict[str, str]:
    return {model.id: model.status for model in engine.gateway.models()}


@pytest.fixture
def base(scripted: Any) -> Path:
    folder: Path = scripted(name="base", mode="hash")
    return folder


async def say(engine: Engine, model: str, prompt: str = "x" * 40, **options: Any) -> Any:
    options = {"max_tokens": 8, "temperature": 0} | options
    return await engine.complete(prompt, model=model, **options)


async def test_each_name_answers_with_its_own_weights(base, tmp_path):
    write_adapter(tmp_path / "fr", 1), write_adapter(tmp_path / "sql", 2)
    adapter = (f"fr={tmp_path / 'fr'}", f"base+sql={tmp_path / 'sql'}")
    async with Engine(str(base), adapter=adapter, model_aliases=("gpt-*",)) as engine:
        assert states(engine) == {"base": "ready", "base+fr": "ready", "base+sql": "ready"}
        names = ("base", "base+fr", "base+sql")
        tokens = [(await say(engine, name)).text for name in names]
        assert len(set(tokens)) == 3
        together = await asyncio.gather(*(say(engine, name) for name in names * 4))
        assert [done.text for done in together] == tokens * 4
        for other in ("fr", "gpt-4+fr", f"{base}+fr", f"base+{tmp_path / 'fr'}"):
            assert (await say(engine, other)).text == tokens[1]
        assert (await say(engine, "gpt-4")).text == tokens[0]
        model = {m.id: m for m in engine.gateway.models()}["base+fr"]
        assert (model.parent, model.aliases) == ("base", ("fr",))


async def test_an_adapter_that_is_not_there_is_a_404(base, tmp_path):
    adapter = (f"fr={write_adapter(tmp_path / 'fr')}",)
    async with Engine(str(base), adapter=adapter) as engine:
        for name in ("base+de", "other+fr", "base+", "base+fr+fr"):
            with pytest.raises(errors.ModelNotFound, match=r"'base', 'base\+fr'") as refused:
                await say(engine, name)
            assert (refused.value.status, refused.value.param) == (404, "model")
        assert engine.gateway.health()["open_requests"] == 0


async def test_its_models_steps_are_no_other_models(base, tmp_path):
    adapter = (f"fr={write_adapter(tmp_path / 'fr')}",)
    async with Engine(str(base), adapter=adapter) as engine:
        finished: list[events.RequestFinished] = []
        engine.on(events.RequestFinished, finished.append)
        await say(engine, "base+fr")
        await until(lambda: finished)
    company = finished[0].company
    assert company is not None
    assert (company.first.others_ms, company.after.others_ms) == (0.0, 0.0)
    assert company.first.sequences == 1.0


async def test_prefixes_are_shared_within_an_adapter_only(base, tmp_path):
    adapter = tuple(f"{n}={write_adapter(tmp_path / n, i)}" for i, n in enumerate("ab"))
    async with Engine(str(base), adapter=adapter) as engine:
        names = ("base", "base+a", "base+b")
        first = [(await say(engine, n)).usage.cached_tokens for n in names]
        again = [(await say(engine, n)).usage.cached_tokens for n in names]
        salted = [(await say(engine, n, cache_salt="s")).usage.cached_tokens for n in names]
    assert first == [0] * 3 and again == [32] * 3 and salted == [0] * 3


async def test_answers_are_kept_and_shared_within_an_adapter_only(base, tmp_path):
    adapter = tuple(f"{n}={write_adapter(tmp_path / n, i)}" for i, n in enumerate("ab"))
    settings = {"coalesce": "deterministic", "response_cache": "memory"}
    async with Engine(str(base), adapter=adapter, **settings) as engine:
        names = ("base", "base+a", "base+b")
        told = [[(await say(engine, n)).text for n in names] for _ in range(2)]
        assert told[0] == told[1] and len(set(told[0])) == 3
        assert engine.gateway._cache_size().entries == 3


async def test_another_file_behind_the_name_is_another_answer(base, tmp_path):
    folder = write_adapter(tmp_path / "a", 1)
    settings = {"adapter": (f"a={folder}",), "response_cache": "memory"}
    async with Engine(str(base), **settings) as engine:
        before = (await say(engine, "base+a")).text
        await engine.gateway.unload("base+a")
        write_adapter(tmp_path / "new", 2)
        os.replace(tmp_path / "new" / "adapters.safetensors", folder / "adapters.safetensors")
        after = await say(engine, "base+a")
        assert after.text != before and after.usage.cached_tokens == 0


async def test_it_comes_and_goes_without_its_base(base, tmp_path):
    adapter = (f"a={write_adapter(tmp_path / 'a')}",)
    async with Engine(str(base), adapter=adapter) as engine:
        loads = []
        engine.on(events.ModelLoaded, lambda event: loads.append(event.model_id))
        for _ in range(2):
            assert (await engine.gateway.unload("base+a")).status == "absent"
            assert states(engine) == {"base": "ready", "base+a": "absent"}
            await say(engine, "base+a")
            assert states(engine) == {"base": "ready", "base+a": "ready"}
        assert loads == ["base+a"] * 2
        assert (await engine.gateway.unload("base")).status == "absent"
        assert states(engine) == {"base": "absent", "base+a": "absent"}
        await say(engine, "base+a")
        assert loads[2:] == ["base", "base+a"]
        await engine.gateway.unload("base")
        await say(engine, "base")
        assert states(engine) == {"base": "ready", "base+a": "absent"}


async def test_unloading_waits_for_running_requests(scripted, tmp_path):
    folder = scripted(name="base", mode="hash", step_delay_ms=1)
    adapter = (f"a={write_adapter(tmp_path / 'a')}",)
    async with Engine(str(folder), adapter=adapter) as engine:
        for leaver in ("base+a", "base"):
            running = asyncio.create_task(say(engine, "base+a", max_tokens=100))
            await until(lambda: engine.gateway.health()["open_requests"] == 1)
            await until(lambda: states(engine)["base+a"] == "ready")
            leaving = asyncio.create_task(engine.gateway.unload(leaver))
            await until(lambda leaver=leaver: states(engine)[leaver] in ("draining", "absent"))
            # Who comes meanwhile waits for its return.
            later = await say(engine, "base+a", max_tokens=100)
            assert (await running).text == later.text
            assert (await leaving).id == leaver


async def test_a_broken_adapter_says_why_and_its_base_answers(base, tmp_path):
    cut = write_adapter(tmp_path / "cut")
    data = (cut / "adapters.safetensors").read_bytes()
    (cut / "adapters.safetensors").write_bytes(data[:-4])
    full = write_adapter(tmp_path / "full", fine_tune_type="full")
    prompt = write_adapter(tmp_path / "prompt", peft_type="PROMPT_TUNING")
    broken = {
        "cut": (cut, "corrupt_file", "adapters.safetensors: is cut short"),
        "full": (full, "unsupported_adapter", "fine_tune_type is 'full'"),
        "prompt": (prompt, "unsupported_adapter", "peft_type is 'PROMPT_TUNING'"),
        "gone": (tmp_path / "gone", "adapter_not_found", "there is no adapter"),
        "empty": (base, "corrupt_file", "adapter_config.json: is missing"),
    }
    adapter = tuple(f"{name}={folder}" for name, (folder, _, _) in broken.items())
    engine = Engine(str(base), adapter=adapter)
    await engine.start(wait_ready=False)
    try:
        assert (await say(engine, "base")).usage.completion_tokens == 8
        for name, (_, code, reason) in broken.items():
            with pytest.raises(errors.ModelBroken, match=reason) as refused:
                await say(engine, f"base+{name}")
            assert (refused.value.status, refused.value.code) == (503, code)
            model = {m.id: m for m in engine.gateway.models()}[f"base+{name}"]
            assert (model.status, model.cause) == ("failed", code)
            assert reason in (model.reason or "")
        assert engine.gateway.health()["status"] == "degraded"
        assert (await say(engine, "base")).usage.completion_tokens == 8
    finally:
        await engine.stop()


async def test_it_counts_in_the_budget_and_leaves_before_its_base(base, tmp_path):
    """Two adapters of 40 MiB beside a base that needs 32: one fits at a time."""
    names = "ab"
    folders = {n: write_adapter(tmp_path / n, i, elements=5 * MIB) for i, n in enumerate(names)}
    adapter = tuple(f"{name}={folder}" for name, folder in folders.items())
    async with Engine(str(base), adapter=adapter, memory_budget=100 * MIB) as engine:
        assert states(engine) == {"base": "ready", "base+a": "ready", "base+b": "absent"}
        for name, other in ("ba", "ab", "ba"):
            await say(engine, f"base+{name}")
            expected = {"base": "ready", f"base+{name}": "ready", f"base+{other}": "absent"}
            assert states(engine) == expected
    big = write_adapter(tmp_path / "big", elements=20 * MIB)
    engine = Engine(str(base), adapter=(f"big={big}",), memory_budget=100 * MIB)
    await engine.start(wait_ready=False)
    try:
        with pytest.raises(errors.ModelTooLarge, match=r"needs 160 MiB.*beside the pinned base"):
            await say(engine, "base+big")
        assert states(engine)["base"] == "ready"
    finally:
        await engine.stop()


async def test_a_pinned_adapter_keeps_its_base(base, tmp_path):
    adapter = (f"a={write_adapter(tmp_path / 'a')}",)
    settings = {"adapter": adapter, "pin": ("base+a",), "keep_alive_s": 0.0}
    async with Engine(str(base), **settings) as engine:
        await say(engine, "base")
        assert states(engine) == {"base": "ready", "base+a": "ready"}
        engine.gateway.pin("base+a", False)
        await until(lambda: states(engine) == {"base": "absent", "base+a": "absent"})


async def test_streams_of_adapters_survive_the_worker(scripted, tmp_path):
    folder = scripted(name="base", mode="hash", step_delay_ms=2)
    adapter = tuple(f"{n}={write_adapter(tmp_path / n, i)}" for i, n in enumerate("ab"))
    async with Engine(str(folder), adapter=adapter) as engine:
        names = ("base", "base+a", "base+b")
        alone = [(await say(engine, n, max_tokens=120)).text for n in names]
        running = [asyncio.create_task(say(engine, n, max_tokens=120)) for n in names]
        await until(lambda: engine.gateway.health()["open_requests"] == 3)
        await asyncio.sleep(0.02)
        os.kill(engine.gateway.health()["workers"][0]["pid"], signal.SIGKILL)
        assert [(await task).text for task in running] == alone
        assert (await say(engine, "base+b", max_tokens=120)).text == alone[2]
        assert set(states(engine).values()) == {"ready"}


async def test_vectors_and_rankings_are_refused(base, tmp_path):
    adapter = (f"a={write_adapter(tmp_path / 'a')}",)
    async with Engine(str(base), adapter=adapter) as engine:
        assert (await engine.embed("x", model="base")).vectors
        with pytest.raises(errors.InvalidRequest, match="gives no vectors") as refused:
            await engine.embed("x", model="base+a")
        assert refused.value.param == "model"
        with pytest.raises(errors.InvalidRequest, match="language model"):
            await engine.rerank("x", ["y"], model="base+a")


def test_wrong_adapters_are_named(base, tmp_path):
    for text, reason in (
        ("fr", r"adapter: expected \[MODEL\+\]NAME=FOLDER, got 'fr'"),
        ("a b=x", r"expected \[MODEL\+\]NAME=FOLDER"),
        ("other+fr=x", "names no served model"),
    ):
        with pytest.raises(errors.ConfigError, match=reason):
            Engine(str(base), adapter=(text,))
    with pytest.raises(errors.ConfigError, match=r"'base\+fr' is there twice"):
        Engine(str(base), adapter=("fr=x", "base+fr=y"))
    with pytest.raises(errors.ConfigError, match=r"model\[0\].adapters: expected NAME=FOLDER"):
        Engine([{"model": str(base), "adapters": ["base+fr=x"]}])


async def test_an_entry_has_adapters_of_its_own(scripted, tmp_path):
    models = [
        {"model": str(scripted(name=n)), "adapters": {"fr": str(write_adapter(tmp_path / f"a{n}"))}}
        for n in "mn"
    ]
    async with Engine(models) as engine:
        assert states(engine) == dict.fromkeys(("m", "n", "m+fr", "n+fr"), "ready")
        by_id = {model.id: model for model in engine.gateway.models()}
        assert by_id["m+fr"].aliases == ("fr",) and by_id["n+fr"].aliases == ()


async def test_an_adapter_may_be_a_canary(base, tmp_path):
    adapter = (f"a={write_adapter(tmp_path / 'a')}",)
    async with Engine(str(base), adapter=adapter) as engine:
        tokens = [(await say(engine, name)).text for name in ("base", "base+a")]
        stages = (Stage(1.0),)
        spec = Spec(name="try", model="base", variant="base+a", mode="ab", stages=stages)
        engine.gateway.start_rollout(spec)
        assert (await say(engine, "base")).text == tokens[1] != tokens[0]


async def test_who_asks_while_its_base_leaves_has_both_again(base, tmp_path):
    """However the two fall together, every request is answered and nothing is held at the end."""
    adapter = tuple(f"{n}={write_adapter(tmp_path / n, i)}" for i, n in enumerate("ab"))
    async with Engine(str(base), adapter=adapter) as engine:
        names = ("base", "base+a", "base+b")
        alone = [(await say(engine, name)).text for name in names]
        for turn in range(8):
            leaving = [asyncio.create_task(engine.gateway.unload(n)) for n in names[turn % 3 :]]
            asked = [asyncio.create_task(say(engine, n)) for n in names]
            gone = asyncio.create_task(say(engine, names[turn % 3], max_tokens=100))
            await asyncio.sleep(0.001 * turn)
            gone.cancel()
            assert [(await task).text for task in asked] == alone
            await asyncio.gather(*leaving)
        await asyncio.gather(gone, return_exceptions=True)
        await until(lambda: not any(slot.busy for slot in engine._models.slots))
        await engine.gateway.unload("base")
        assert set(states(engine).values()) == {"absent"}
        assert engine._models.residency.held_bytes == 0
