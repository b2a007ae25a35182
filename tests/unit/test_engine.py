"""The engine and its gateway over a real worker process that runs a scripted model."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from mlx_serving import Engine, SyncEngine, errors
from mlx_serving.telemetry import events
from mlx_serving.types import GenerateRequest, SamplingParams, TextPrompt
from model_folders import safetensors


def request(text="Hello", **fields):
    fields.setdefault("sampling", SamplingParams())
    return GenerateRequest(request_id="r", model="scripted", prompt=TextPrompt(text=text), **fields)


async def test_completes_and_counts(scripted):
    async with Engine(str(scripted(text="Hé, 日本!"))) as engine:
        done = await engine.complete("Hello", max_tokens=100)
    assert done.text == "Hé, 日本!"
    answer = done.answers[0]
    # The end-of-sequence token ends the answer and counts, as OpenAI counts it.
    assert (answer.finish_reason, done.usage.completion_tokens) == (
        "stop",
        len("Hé, 日本!".encode()) + 1,
    )
    assert done.usage.prompt_tokens == 5


async def test_streams_whole_characters_only(scripted):
    async with Engine(str(scripted(text="日本語", step_delay_ms=5))) as engine:
        chunks = [c async for c in engine.generate("x", max_tokens=50)]
    assert "".join(c.text for c in chunks) == "日本語"
    assert all(set(c.text) <= set("日本語") for c in chunks)
    assert [c.finish_reason for c in chunks][-1] == "stop"
    assert all(c.finish_reason is None for c in chunks[:-1])


async def test_stop_string_across_tokens_cuts_and_counts(scripted):
    async with Engine(str(scripted(text="one STOP two"))) as engine:
        done = await engine.complete("x", max_tokens=50, stop=("STOP",))
        kept = await engine.complete("x", max_tokens=50, stop="STOP", include_stop_str=True)
    assert (done.text, kept.text) == ("one ", "one STOP")
    assert done.usage.completion_tokens == len("one STOP")
    assert done.answers[0].finish_reason == "stop"


async def test_length_is_clamped_to_the_context(scripted):
    async with Engine(str(scripted(mode="cycle", token_ids=[97])), context_length=32) as engine:
        done = await engine.complete("x" * 20, max_tokens=1000)
        with pytest.raises(errors.ContextOverflow) as overflow:
            await engine.complete("x" * 32, max_tokens=1)
    assert (done.text, done.answers[0].finish_reason) == ("a" * 12, "length")
    assert overflow.value.param == "prompt"


async def test_a_prompt_is_computed_once_for_each_salt(scripted):
    folder = str(scripted(mode="hash"))
    async with Engine(folder) as engine:
        cached, written, texts = [], [], set()
        for salt in (None, None, "a", "a", None):
            done = await engine.complete("x" * 40, max_tokens=4, temperature=0, cache_salt=salt)
            cached.append(done.usage.cached_tokens)
            written.append(done.usage.cache_write_tokens)
            texts.add(done.text)
    assert (cached, written) == ([0, 32, 0, 32, 32], [32, 0, 32, 0, 0])
    assert len(texts) == 1
    async with Engine(folder, prefix_cache_bytes=0) as engine:
        for _ in range(2):
            done = await engine.complete("x" * 40, max_tokens=4, temperature=0)
            assert done.usage.cached_tokens == done.usage.cache_write_tokens == 0


async def test_the_stages_of_the_way_to_a_first_token_are_timed(scripted):
    async with Engine(str(scripted(mode="hash"))) as engine:
        await engine.complete("x" * 40, max_tokens=4, temperature=0)
        text = engine.gateway.metrics().decode()
        (name,) = [model.id for model in engine.gateway.models()]
        for stage in ("tokenise", "hash", "queue", "prefill"):
            labels = f'{{model="{name}",stage="{stage}"}}'
            assert f"mlx_serving_ttft_stage_seconds_count{labels} 1.0" in text


async def test_the_prefix_cache_is_counted_and_emptied(scripted):
    async with Engine(str(scripted(mode="hash"))) as engine:

        async def ask() -> int:
            done = await engine.complete("x" * 40, max_tokens=4, temperature=0)
            return done.usage.cached_tokens

        def stats():
            (found,) = engine.gateway.cache_stats().values()
            return found

        assert [await ask(), await ask()] == [0, 32]
        assert (stats().memory_hit_tokens, stats().miss_tokens) == (32, 48)
        await engine.gateway.clear_cache()
        assert stats().memory_blocks == 0
        assert await ask() == 0
        assert stats().miss_tokens == 88
        text = engine.gateway.metrics().decode()
    assert 'mlx_serving_prefix_cache_tokens_total{model="scripted",tier="memory"} 32.0' in text


async def test_choices_differ_by_their_key_and_repeat_by_seed(scripted):
    async with Engine(str(scripted(mode="hash"))) as engine:
        kwargs = {"n": 4, "max_tokens": 12, "temperature": 1.0}
        one = await engine.complete("x", seed=7, **kwargs)
        two = await engine.complete("x", seed=7, **kwargs)
        other = await engine.complete("x", seed=8, **kwargs)
    ids = [a.token_ids for a in one.answers]
    assert len(set(ids)) == 4
    assert ids == [a.token_ids for a in two.answers] != [a.token_ids for a in other.answers]
    assert one.usage.completion_tokens == 48 and one.seed == 7


async def test_sixteen_at_once_each_as_alone(scripted):
    prompts = [f"prompt {i}" for i in range(16)]
    async with Engine(str(scripted(mode="hash", step_delay_ms=2))) as engine:
        alone = [await engine.complete(p, max_tokens=20, temperature=0) for p in prompts]
        together = await engine.batch(prompts, max_tokens=20, temperature=0)
        text = engine.metrics.render().decode()
    assert [c.answers[0].token_ids for c in alone] == [c.answers[0].token_ids for c in together]
    assert 'mlx_serving_requests_total{model="scripted",outcome="length"} 32.0' in text
    assert 'mlx_serving_generated_tokens_total{model="scripted"} 640.0' in text


async def test_leaving_a_stream_early_frees_everything(scripted):
    async with Engine(str(scripted(mode="cycle", token_ids=[98], step_delay_ms=1))) as engine:
        stream = engine.generate("x", max_tokens=400)
        assert set((await anext(stream)).text) == {"b"}
        await stream.aclose()
        assert engine.gateway.health()["open_requests"] == 0
        assert (await engine.complete("x", max_tokens=2)).text == "bb"
        assert 'outcome="cancelled"} 1.0' in engine.metrics.render().decode()


async def test_cancel_by_id_ends_the_reader(scripted):
    async with Engine(str(scripted(mode="cycle", token_ids=[98], step_delay_ms=5))) as engine:
        generation = await engine.gateway.open(request())
        with pytest.raises(errors.Cancelled):
            async for _ in generation:
                assert engine.gateway.cancel("r") or True
        assert not engine.gateway.cancel("r")
        assert engine.gateway.health()["open_requests"] == 0


async def test_unknown_model_and_parameters_are_named(scripted):
    async with Engine(str(scripted(text="x"))) as engine:
        with pytest.raises(errors.ModelNotFound) as unknown:
            await engine.complete("x", model="nope")
        with pytest.raises(errors.UnsupportedParameter) as parameter:
            await engine.complete("x", temprature=1)
        with pytest.raises(errors.InvalidRequest) as bias:
            await engine.complete("x", logit_bias={5000: 1.0})
        with pytest.raises(errors.InvalidRequest) as temperature:
            await engine.complete("x", temperature=float("nan"))
    assert [e.value.param for e in (unknown, parameter, bias, temperature)] == [
        "model",
        "temprature",
        "logit_bias",
        "temperature",
    ]


@pytest.mark.parametrize(
    "params",
    [{"temperature": "hot"}, {"max_tokens": "9"}, {"stop": [1]}, {"priority": "soon"}, {"n": 1.5}],
    ids=lambda p: next(iter(p)),
)
async def test_wrong_types_are_typed_errors_that_name_the_field(scripted, params):
    async with Engine(str(scripted(text="x"))) as engine:
        with pytest.raises(errors.InvalidRequest) as wrong:
            await engine.complete("x", **params)
        with pytest.raises(errors.InvalidRequest):
            await engine.chat([{"role": 5, "content": "x"}])
    assert wrong.value.param is not None and wrong.value.param.startswith(next(iter(params)))


async def test_the_queue_is_bounded(scripted):
    model = scripted(mode="cycle", token_ids=[98], step_delay_ms=5)
    async with Engine(str(model), max_queue=2) as engine:
        running = [await engine.gateway.open(request()) for _ in range(2)]
        with pytest.raises(errors.Overloaded) as full:
            await engine.gateway.open(request())
        assert full.value.retry_after_s is not None and full.value.retry_after_s >= 1
        running[0].cancel()
        (await engine.gateway.open(request())).cancel()
        running[1].cancel()


async def test_draining_finishes_what_runs_and_refuses_the_rest(scripted):
    async with Engine(str(scripted(text="all of it", step_delay_ms=5))) as engine:
        begun = asyncio.Event()
        engine.on(events.RequestStarted, lambda _: begun.set())
        answer = asyncio.create_task(engine.complete("x", max_tokens=50))
        await begun.wait()
        drained = asyncio.create_task(engine.gateway.drain(30))
        await asyncio.sleep(0)
        assert engine.gateway.health()["status"] == "draining"
        with pytest.raises(errors.Draining):
            await engine.complete("x")
        assert (await answer).text == "all of it"
        assert await drained


async def test_a_stream_outlives_its_worker(scripted):
    seen: list[object] = []
    model = scripted(mode="cycle", token_ids=[98], step_delay_ms=5)
    async with Engine(str(model)) as engine:
        engine.on(events.WorkerDied, seen.append)
        stream = engine.generate("x", max_tokens=200)
        text = (await anext(stream)).text
        os.kill(engine.gateway.health()["workers"][0]["pid"], signal.SIGKILL)
        async for chunk in stream:
            text += chunk.text
        assert text == "b" * 200
        assert (await engine.complete("x", max_tokens=3)).text == "bbb"
        assert engine.gateway.health()["workers"][0]["restarts"] == 1
    assert len(seen) == 1


async def test_a_model_that_cannot_load_says_why_and_the_other_goes_on(scripted, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    engine = Engine([str(scripted(text="fine")), str(broken)])
    try:
        await engine.start(wait_ready=False)
        assert (await engine.complete("x", max_tokens=9)).text == "fine"
        with pytest.raises(errors.ModelBroken, match=r"config\.json"):
            await engine.complete("x", model="broken")
        status = {m.id: m.status for m in engine.gateway.models()}
        assert status == {"scripted": "ready", "broken": "failed"}
        assert engine.gateway.health()["status"] == "degraded"
    finally:
        await engine.stop()


async def test_a_load_that_is_asked_for_anew_is_tried_at_once(scripted):
    config = scripted(text="fine") / "config.json"
    whole = config.read_text()
    config.write_text("{")
    engine = Engine(str(config.parent))
    try:
        with pytest.raises(errors.ModelBroken):
            await engine.start()
        config.write_text(whole)
        assert (await engine.gateway.load("scripted", anew=True)).status == "ready"
    finally:
        await engine.stop()


async def test_a_loaded_models_parameters_are_told(scripted):
    folder = scripted(text="x")
    (folder / "model.safetensors").write_bytes(safetensors(w=("F32", (8,))))
    async with Engine(str(folder)) as engine:
        info = engine.gateway.model_info("scripted")
    assert info is not None and info.parameters == 8


async def test_events_tell_the_story(scripted):
    engine = Engine(str(scripted(text="x")))
    with engine.subscribe() as story:
        async with engine:
            await engine.complete("x", max_tokens=5)
            kinds = []
            while "RequestFinished" not in kinds:
                kinds.append(type(await anext(story)).__name__)
    assert kinds[-2:] == ["RequestStarted", "RequestFinished"]
    assert set(kinds) >= {"WorkerStarted", "ModelLoading", "ModelLoaded"}


async def test_in_process_is_the_same_engine(scripted):
    async with Engine(str(scripted(text="same")), supervise=False) as engine:
        assert (await engine.complete("x", max_tokens=9)).text == "same"
        assert engine.gateway.health()["workers"][0]["pid"] == os.getpid()


async def test_tokenise_and_back(scripted):
    async with Engine(str(scripted(text="x"))) as engine:
        ids = await engine.tokenize("Hé")
        assert ids == list("Hé".encode()) and await engine.detokenize(ids) == "Hé"
        chat = await engine.tokenize([{"role": "user", "content": "Hi"}])
        assert chat[0] == 257  # <|im_start|>: ChatML, for want of a template


def test_synchronous_twin(scripted):
    with SyncEngine(str(scripted(text="Hi there"))) as engine:
        assert engine.chat("Hello?").text == "Hi there"
        assert "".join(c.text for c in engine.generate("x", max_tokens=50)) == "Hi there"
        assert [c.text for c in engine.batch(["a", "b"], max_tokens=2)] == ["Hi", "Hi"]
        for chunk in engine.generate("x", max_tokens=50):
            assert "Hi there".startswith(chunk.text)
            break
        with pytest.raises(errors.InvalidRequest):
            engine.complete("x", max_tokens=0)


def test_settings_are_checked_before_anything_starts():
    with pytest.raises(errors.ConfigError):
        Engine("x", no_such_setting=1)
    with pytest.raises(errors.ConfigError):
        Engine(["a", "b"], served_model_name=("one",))


@pytest.mark.parametrize("own", [True, False])
def test_a_template_that_is_not_there_is_told_before_anything_is_loaded(
    tmp_path: Path, own: bool
) -> None:
    file = str(tmp_path / "none.jinja")
    model = {"model": "x", "chat_template": file} if own else "x"
    with pytest.raises(errors.ConfigError, match=r"^chat_template: .*none\.jinja: No such file"):
        Engine([model], **({} if own else {"chat_template": file}))


async def test_half_a_model_is_not_left_in_the_worker(scripted: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.jinja").write_text("{% if %}")
    engine = Engine(str(scripted()), chat_template=str(tmp_path / "bad.jinja"))
    try:
        with pytest.raises(errors.ModelBroken, match="does not parse"):
            await engine.start()
        (worker,) = engine.gateway.health()["workers"]
        assert not worker["models"]
    finally:
        await engine.stop()
