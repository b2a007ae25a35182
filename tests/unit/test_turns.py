"""Deadlines, classes and clients through the engine, over a real worker process."""

from __future__ import annotations

import asyncio

import pytest

from mlx_serving import Engine, errors
from mlx_serving.telemetry.events import RequestFinished
from mlx_serving.types import EmbedRequest, GenerateRequest, Priority, SamplingParams, TextPrompt


def request(text="Hello", **fields) -> GenerateRequest:
    fields.setdefault("sampling", SamplingParams(temperature=0.0))
    fields.setdefault("max_tokens", 400)
    return GenerateRequest(request_id="r", model="scripted", prompt=TextPrompt(text=text), **fields)


async def answer(generation) -> str:
    return "".join([event.text async for events in generation for event in events])


async def test_an_answer_ends_at_its_deadline(scripted):
    async with Engine(str(scripted(mode="cycle", token_ids=[98], step_delay_ms=20))) as engine:
        with pytest.raises(errors.DeadlineExceeded) as caught:
            await answer(await engine.gateway.open(request(timeout_s=0.3)))
        assert (caught.value.status, caught.value.param) == (504, "timeout")
        assert engine.gateway.health()["open_requests"] == 0
        assert 'outcome="deadline_exceeded"} 1.0' in engine.metrics.render().decode()
        done = await engine.complete("x", max_tokens=2, timeout_s=3600)
        assert done.text == "bb"


async def test_work_that_cannot_end_in_time_is_not_begun(scripted):
    folder = str(scripted(mode="cycle", token_ids=[98], step_delay_ms=50))
    async with Engine(folder, max_num_seqs=2) as engine:
        running = await engine.gateway.open(request(max_tokens=300))
        rows = aiter(running)
        for _ in range(3):
            await anext(rows)  # its steps' pace is known
        endless = SamplingParams(temperature=0.0, ignore_eos=True)
        # 400 steps of 50 ms each do not fit 10 s; they need not be begun to know it.
        hopeless = await engine.gateway.open(request("y", sampling=endless, timeout_s=10.0))
        with pytest.raises(errors.DeadlineExceeded, match="could not have been complete"):
            await answer(hopeless)
        assert hopeless.usage().completion_tokens == 0
        running.cancel()


async def test_a_critical_request_takes_a_row_and_its_owner_goes_on_with_equal_tokens(scripted):
    folder = str(scripted(mode="hash", step_delay_ms=5))
    async with Engine(folder, max_num_seqs=1) as engine:
        alone = await engine.complete("low", max_tokens=200, temperature=0)
        low = await engine.gateway.open(request("low", max_tokens=200, priority=Priority.LOW))
        reading = asyncio.create_task(answer(low))
        urgent = await engine.gateway.open(
            request("now", max_tokens=3, priority=Priority.CRITICAL, client="a", weight=2.0)
        )
        assert len(await answer(urgent)) > 0
        assert await reading == alone.text


async def test_it_is_told_how_long_a_request_waited_for_its_row(scripted):
    ended: list[RequestFinished] = []
    folder = str(scripted(mode="cycle", token_ids=[98], step_delay_ms=2))
    async with Engine(folder, max_num_seqs=1, coalesce="deterministic") as engine:
        engine.on(RequestFinished, ended.append)
        texts = ("one", "two", "three", "three")
        await asyncio.gather(
            *(engine.complete(text, max_tokens=5, temperature=0) for text in texts)
        )
    assert len(ended) == 4
    for finished in ended:
        assert finished.queue_ms is not None and finished.ttft_ms is not None
        assert 0 <= finished.queue_ms <= finished.ttft_ms


async def test_texts_have_classes_too(scripted):
    async with Engine(str(scripted()), class_queue=("low=0",)) as engine:

        def wish(priority: Priority) -> EmbedRequest:
            inputs = (TextPrompt(text="x"),)
            return EmbedRequest(request_id="e", model="scripted", inputs=inputs, priority=priority)

        with pytest.raises(errors.Overloaded):
            await engine.gateway.embed(wish(Priority.LOW))
        assert len((await engine.gateway.embed(wish(Priority.NORMAL))).vectors) == 1
        refused = engine.metrics.refused.labels("scripted", "low", "overloaded")
        assert refused._value.get() == 1
        assert 'mlx_serving_open_requests{class="low"} 0.0' in engine.metrics.render().decode()


async def test_classes_have_queues_of_their_own(scripted):
    folder = str(scripted(mode="cycle", token_ids=[98], step_delay_ms=5))
    async with Engine(folder, class_queue=("low=1",), max_queue=2) as engine:
        low = await engine.gateway.open(request(priority=Priority.LOW))
        with pytest.raises(errors.Overloaded):
            await engine.gateway.open(request(priority=Priority.LOW))
        normal = await engine.gateway.open(request())
        for generation in (low, normal):
            generation.cancel()


@pytest.mark.parametrize("item", ["low", "urgent=3", "low=-1", "low=x"])
def test_a_wrong_bound_is_named(item) -> None:
    with pytest.raises(errors.ConfigError, match="class_queue"):
        Engine("x", class_queue=(item,))


@pytest.mark.parametrize("fields", [{"timeout_s": 0.0}, {"timeout_s": 1e9}, {"weight": 0.0}])
def test_what_is_out_of_range_is_named(fields) -> None:
    with pytest.raises(errors.InvalidRequest) as caught:
        request(**fields)
    assert caught.value.param in ("timeout", "weight")
