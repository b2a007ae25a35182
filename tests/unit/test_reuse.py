"""Shared answers through the engine, over a real worker process that runs a scripted model."""

from __future__ import annotations

import asyncio
import os
import re
import signal

import pytest

from mlx_serving import Engine, errors
from mlx_serving.types import GenerateRequest, SamplingParams, TextPrompt

GREEDY = SamplingParams(temperature=0.0)


def request(text="Hello", **fields) -> GenerateRequest:
    fields.setdefault("sampling", GREEDY)
    fields.setdefault("max_tokens", 40)
    return GenerateRequest(request_id="r", model="scripted", prompt=TextPrompt(text=text), **fields)


def metric(engine: Engine, line: str) -> float:
    found = re.search(rf"^{re.escape(line)} (\S+)$", engine.metrics.render().decode(), re.MULTILINE)
    return float(found.group(1)) if found else 0.0


async def answer(generation) -> tuple[str, str | None]:
    text, reason = "", None
    async for events in generation:
        for event in events:
            text, reason = text + event.text, event.finish_reason or reason
    return text, reason


async def test_a_hundred_at_once_are_computed_once(scripted):
    folder = str(scripted(mode="hash", step_delay_ms=2))
    async with Engine(folder) as engine:
        alone = await engine.complete("Hello", max_tokens=40, temperature=0)
    async with Engine(folder, coalesce="deterministic") as engine:
        done = await asyncio.gather(
            *(engine.complete("Hello", max_tokens=40, temperature=0) for _ in range(100))
        )
        assert {one.text for one in done} == {alone.text}
        # Opened before any had ended: they were all there before the worker could say 40 tokens.
        joined = metric(engine, 'mlx_serving_coalesced_sequences_total{model="scripted"}')
        shared = metric(engine, 'mlx_serving_shared_tokens_total{by="shared",model="scripted"}')
        assert joined > 0 and shared == 40 * joined
        assert sum(one.usage.shared_tokens for one in done) == shared
        assert all(one.usage.cached_tokens == 5 for one in done if one.usage.shared_tokens)
        assert metric(engine, 'mlx_serving_generated_tokens_total{model="scripted"}') == 4000


async def test_greedy_choices_of_one_request_share_too(scripted):
    async with Engine(str(scripted(mode="hash")), coalesce="deterministic") as engine:
        generation = await engine.gateway.open(request(n=3))
        assert [source.reused for source in generation.sources] == ["miss", "shared", "shared"]
        texts = ["", "", ""]
        async for events in generation:
            for event in events:
                texts[event.choice] += event.text
        assert len(set(texts)) == 1 and texts[0]
        assert generation.usage().shared_tokens == 80


async def test_seeds_part_and_salts_part(scripted):
    folder = str(scripted(mode="cycle", token_ids=[97], step_delay_ms=5))
    warm = SamplingParams(temperature=1.0)
    async with Engine(folder, coalesce="deterministic") as engine:
        first = [
            request(),
            request(cache_salt="a"),
            request(seed=1, sampling=warm),
            request(seed=2, sampling=warm),
            request(sampling=warm),
            request(stop=("x",)),
        ]
        opened = [await engine.gateway.open(one) for one in (*first, *first)]
        kinds = [generation.reused for generation in opened]
        assert kinds == ["miss"] * 4 + [None, "miss"] + ["shared"] * 4 + [None, "shared"]
        for generation in opened:
            generation.cancel()


async def test_all_shares_drawn_seeds_and_says_which(scripted):
    folder = str(scripted(mode="hash", step_delay_ms=5))
    async with Engine(folder, coalesce="all") as engine:
        warm = SamplingParams(temperature=1.0)
        one = await engine.gateway.open(request(sampling=warm))
        other = await engine.gateway.open(request(sampling=warm))
        assert (one.reused, other.reused) == ("miss", "shared") and one.seed == other.seed
        several = await engine.gateway.open(request(sampling=warm, n=2))
        assert several.reused is None, "one seed keys all its choices"
        several.cancel()
        (text, _), (same, _) = await asyncio.gather(answer(one), answer(other))
        again = await engine.gateway.open(request(sampling=warm, seed=one.seed))
        assert text == same == (await answer(again))[0]


async def test_a_shared_sequence_outlives_its_worker_and_its_first_reader(scripted):
    folder = str(scripted(mode="hash", step_delay_ms=5))
    async with Engine(folder) as engine:
        alone = await engine.complete("Hello", max_tokens=100, temperature=0)
    async with Engine(folder, coalesce="deterministic") as engine:
        first, second, third = [
            await engine.gateway.open(request(max_tokens=100)) for _ in range(3)
        ]
        await anext(aiter(first))
        first.cancel()
        os.kill(engine.gateway.health()["workers"][0]["pid"], signal.SIGKILL)
        late = await engine.gateway.open(request(max_tokens=100))
        answers = await asyncio.gather(answer(second), answer(third), answer(late))
        assert {text for text, _ in answers} == {alone.text}
        assert second.reused == third.reused == "shared"


async def test_a_stop_string_ends_each_reader_and_the_sequence(scripted):
    folder = str(scripted(text="one STOP two", step_delay_ms=2))
    async with Engine(folder, coalesce="deterministic") as engine:
        opened = [await engine.gateway.open(request(stop=("STOP",))) for _ in range(3)]
        answers = await asyncio.gather(*map(answer, opened))
        assert answers == [("one ", "stop")] * 3
        assert len(engine.gateway._reuse.flights) == 0
        assert engine.gateway.health()["open_requests"] == 0


async def test_a_failure_reaches_every_reader_once(scripted):
    folder = str(scripted(mode="hash", fail_on=ord("!")))
    async with Engine(folder, coalesce="deterministic") as engine:
        opened = [await engine.gateway.open(request("no!")) for _ in range(3)]
        for generation in opened:
            with pytest.raises(errors.ServerError):
                await answer(generation)
        again = await engine.gateway.open(request("no!"))
        assert again.reused == "miss"
        again.cancel()


async def test_an_answer_is_told_again_without_its_worker(scripted):
    folder = str(scripted(text="one STOP two"))
    async with Engine(folder, response_cache="memory") as engine:
        wanted = [{}, {"stop": ("STOP",)}, {"max_tokens": 3}, {"n": 2}]
        for kept, fields in enumerate(wanted, 1):
            first = await engine.gateway.open(request(**fields))
            told = await answer(first)
            while metric(engine, "mlx_serving_response_cache_entries") < min(kept, 3):  # noqa: ASYNC110 - kept in the background
                await asyncio.sleep(0)
            os.kill(engine.gateway.health()["workers"][0]["pid"], signal.SIGSTOP)
            again = await engine.gateway.open(request(**fields))
            assert (first.reused, again.reused) == ("miss" if fields != {"n": 2} else "hit", "hit")
            # With the worker stopped: nothing is asked of it.
            assert await answer(again) == told
            usage = again.usage()
            assert usage.shared_tokens == usage.completion_tokens == first.usage().completion_tokens
            assert usage.cached_tokens == usage.prompt_tokens == 5
            os.kill(engine.gateway.health()["workers"][0]["pid"], signal.SIGCONT)
        assert metric(engine, 'mlx_serving_response_cache_lookups_total{result="hit"}') == 7
        assert metric(engine, "mlx_serving_response_cache_entries") == 3
        other = await engine.gateway.open(request(cache_salt="a"))
        assert other.reused == "miss"
        other.cancel()


async def test_who_leaves_early_leaves_nothing_in_the_cache(scripted):
    folder = str(scripted(mode="cycle", token_ids=[98], step_delay_ms=1))
    async with Engine(folder, response_cache="memory") as engine:
        stream = engine.generate("x", max_tokens=400, temperature=0)
        await anext(stream)
        await stream.aclose()
        assert metric(engine, "mlx_serving_response_cache_entries") == 0


async def test_answers_on_disk_survive_the_server_but_not_a_change_of_the_model(scripted, tmp_path):
    settings = {"response_cache": "disk", "home": str(tmp_path / "home")}
    folder = scripted(text="first")
    async with Engine(str(folder), **settings) as engine:
        assert (await engine.complete("x", temperature=0)).text == "first"
    async with Engine(str(folder), **settings) as engine:
        again = await engine.complete("x", temperature=0)
        assert (again.text, again.usage.shared_tokens) == ("first", 6)
    config = (folder / "config.json").read_text().replace("102", "70")  # f to F
    (folder / "config.json").write_text(config)
    async with Engine(str(folder), **settings) as engine:
        changed = await engine.complete("x", temperature=0)
        assert (changed.text, changed.usage.shared_tokens) == ("First", 0)


async def test_a_cache_that_is_not_there_costs_no_answer(scripted):
    settings = {"response_cache": "redis", "response_cache_url": "redis://127.0.0.1:1/0"}
    async with Engine(str(scripted(text="Hi.")), **settings) as engine:
        for _ in range(5):
            assert (await engine.complete("x", temperature=0)).text == "Hi."
        assert metric(engine, 'mlx_serving_response_cache_lookups_total{result="error"}') == 5
