"""Vectors and rankings through the engine: what is read, refused, cut, kept alive and shared."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import encoders
from mlx_serving import Engine, SyncEngine, errors
from mlx_serving.telemetry import events

POISON = 200


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("encoders")
    prompts = {
        "config_sentence_transformers.json": {"prompts": {"query": "w9 w9 ", "document": "w8 "}}
    }
    return {
        "plain": encoders.write(parent / "plain"),
        "prompted": encoders.write(parent / "prompted", pooling="mean_tokens", files=prompts),
        "ranker": encoders.write(parent / "ranker", labels=1),
        "roberta": encoders.write(parent / "roberta", "xlm-roberta", labels=1),
    }


@pytest.fixture(scope="module")
def engine(tiny: dict[str, Path]) -> Iterator[SyncEngine]:
    with SyncEngine([str(path) for path in tiny.values()]) as engine:
        yield engine


def ids_of(words: str) -> list[int]:
    return [2, *(4 + int(word[1:]) for word in words.split()), 3]


def unit(vector: Any) -> np.ndarray:
    return np.asarray(vector) / np.linalg.norm(vector)


def failing(call: Any, *args: Any, **params: Any) -> tuple[str, str | None]:
    with pytest.raises(errors.InvalidRequest) as caught:
        call(*args, **params)
    return caught.value.code, caught.value.param


def test_texts_and_token_ids_in_their_order(engine: SyncEngine, tiny: dict[str, Path]) -> None:
    texts = [f"w{i} " * (1 + i % 9) + "w2" for i in range(50)]
    found = engine.embed(texts, model="plain")
    oracle = encoders.Oracle(tiny["plain"])
    for text, vector in zip(texts, found.vectors, strict=True):
        assert isinstance(vector, array) and vector.typecode == "f"
        expected = unit(oracle.states(ids_of(text)).mean(0))
        assert np.asarray(vector) == pytest.approx(expected, abs=1e-5)
    assert found.usage.prompt_tokens == sum(len(ids_of(text)) for text in texts)
    ids = engine.embed([ids_of(text) for text in texts[:3]], model="plain")
    one = engine.embed(ids_of(texts[1]), model="plain")
    for i in range(3):
        assert np.asarray(ids.vectors[i]) == pytest.approx(np.asarray(found.vectors[i]), abs=1e-6)
    assert np.asarray(one.vectors[0]) == pytest.approx(np.asarray(ids.vectors[1]), abs=1e-6)


def test_dimensions_are_cut_and_scaled_again(engine: SyncEngine) -> None:
    raw = (engine.embed("w1 w2", model="plain", normalize=False)).vectors[0]
    whole = (engine.embed("w1 w2", model="plain")).vectors[0]
    short = (engine.embed("w1 w2", model="plain", dimensions=5)).vectors[0]
    bare = (engine.embed("w1 w2", model="plain", dimensions=5, normalize=False)).vectors[0]
    assert len(raw) == len(whole) == 32 and len(short) == 5 and list(bare) == list(raw[:5])
    assert np.linalg.norm(whole) == pytest.approx(1) == np.linalg.norm(short)
    assert np.asarray(short) == pytest.approx(unit(raw[:5]), abs=1e-6)
    assert failing(engine.embed, "w1", model="plain", dimensions=33) == (
        "invalid_value",
        "dimensions",
    )


def test_a_text_that_is_too_long_is_named_or_cut(engine: SyncEngine, tiny: dict[str, Path]) -> None:
    long, oracle = "w5 " * 40, encoders.Oracle(tiny["plain"])
    too_long = ("context_length_exceeded", "texts[1]")
    assert failing(engine.embed, ["w1", long], model="plain") == too_long
    assert failing(engine.embed, long, model="plain")[1] == "texts"
    for truncate, kept in ((True, 32), (7, 7), (100, 32)):
        vector = (engine.embed(long, model="plain", truncate=truncate)).vectors[0]
        expected = unit(oracle.states(ids_of("w5 " * (kept - 2))).mean(0))
        assert np.asarray(vector) == pytest.approx(expected, abs=1e-5)
    assert (engine.embed("w5 " * 30, model="plain")).usage.prompt_tokens == 32
    cut = engine.embed([[5] * 40], model="plain", truncate=3)
    assert cut.usage.prompt_tokens == 3
    assert failing(engine.embed, long, model="plain", truncate=1)[1] == "texts"


def test_what_cannot_be_read_is_named(engine: SyncEngine) -> None:
    assert failing(engine.embed, [[5, 64]], model="plain") == ("invalid_value", "texts[0]")
    assert failing(engine.embed, [], model="plain") == ("invalid_value", "texts")
    assert failing(engine.embed, ["w1", None], model="plain")[1] == "texts[1]"  # type: ignore[list-item]
    assert failing(engine.embed, ["\ud800"], model="plain")[1] == "texts"
    with pytest.raises(errors.ModelNotFound):
        engine.embed("w1", model="gone")


def test_a_models_own_prompts(engine: SyncEngine, tiny: dict[str, Path]) -> None:
    bare = engine.embed(["w9 w9 w1"], model="prompted")
    asked = engine.embed(["w1"], model="prompted", prompt_name="query")
    assert np.asarray(asked.vectors[0]) == pytest.approx(np.asarray(bare.vectors[0]), abs=1e-6)
    for model, texts in (("prompted", ["w1"]), ("plain", ["w1"]), ("prompted", [[5]])):
        name = "question" if texts == ["w1"] else "query"
        refused = failing(engine.embed, texts, model=model, prompt_name=name)
        assert refused == ("invalid_value", "prompt_name")


@pytest.mark.parametrize("model", ["ranker", "roberta"])
def test_a_reranker_reads_pairs(engine: SyncEngine, tiny: dict[str, Path], model: str) -> None:
    query, documents = "w1 w2", ["w3", "w4 w5 w6", "w2 w1 " * 5, "w7"]
    found = engine.rerank(query, documents, model=model)
    oracle = encoders.Oracle(tiny[model])
    scores = {}
    for i, document in enumerate(documents):
        first, second = ids_of(query), ids_of(document)[1:]
        if model == "roberta":
            first = [0, *first[1:-1], 2, 2]
            second = [*second[:-1], 2]
        kinds = [0] * len(first) + [0 if model == "roberta" else 1] * len(second)
        scores[i] = 1 / (1 + np.exp(-oracle.score([*first, *second], kinds)))
    order = sorted(scores, key=lambda i: -scores[i])
    assert [r.index for r in found.results] == order
    for ranked in found.results:
        assert ranked.score == pytest.approx(scores[ranked.index], abs=1e-5)
    best = engine.rerank(query, documents, model=model, top_n=2)
    assert best.results == found.results[:2] and best.usage == found.usage


def test_a_pair_is_cut_at_the_documents_end(engine: SyncEngine) -> None:
    long = "w3 w4 " * 30
    assert failing(engine.rerank, "w1", ["w2", long], model="ranker")[1] == "documents[1]"
    cut = engine.rerank("w1", [long], model="ranker", truncate=True)
    same = engine.rerank("w1", ["w3 w4 " * 14], model="ranker")
    assert cut.results[0].score == pytest.approx(same.results[0].score, abs=1e-6)
    assert cut.usage.prompt_tokens == 32 == same.usage.prompt_tokens
    refused = failing(engine.rerank, "w1 " * 40, ["w2"], model="ranker", truncate=True)
    assert refused[0] == "context_length_exceeded"


def test_an_embedder_ranks_by_cosine_with_its_prompts(engine: SyncEngine) -> None:
    query = (engine.embed("w1 w2", model="prompted", prompt_name="query")).vectors[0]
    documents = ["w5", "w1 w2", "w9 w9 w1 w2"]
    sides = (engine.embed(documents, model="prompted", prompt_name="document")).vectors
    expected = [float(np.asarray(query) @ np.asarray(side)) for side in sides]
    found = engine.rerank("w1 w2", documents, model="prompted")
    assert [r.index for r in found.results] == list(np.argsort(expected)[::-1])
    assert found.results[0].score == pytest.approx(max(expected), abs=1e-5)


def test_each_model_says_what_it_is_for(engine: SyncEngine, scripted: Any) -> None:
    for call, model in (
        (engine.chat, "plain"),
        (engine.complete, "ranker"),
        (engine.embed, "ranker"),
    ):
        assert failing(call, "w1", model=model) == ("invalid_value", "model")
    with SyncEngine(str(scripted(text="Hi."))) as other:
        first, again = other.embed(["a", "b"]), other.embed("a")
        assert len(first.vectors[0]) == 8
        assert first.vectors[0] == again.vectors[0] != first.vectors[1]
        assert failing(other.rerank, "q", ["d"]) == ("invalid_value", "model")
        assert other.complete("x").text == "Hi."


async def test_texts_survive_the_worker(scripted: Any) -> None:
    """Killed twice on the way: every vector is what it would have been."""
    texts = [f"text {i} " * (1 + i % 7) for i in range(120)]
    async with Engine(str(scripted(step_delay_ms=5)), prefill_step_size=64) as engine:
        expected = await engine.embed(texts)
        deaths: list[object] = []
        engine.on(events.WorkerDied, deaths.append)
        for _ in range(2):
            before = len(deaths)
            asked = asyncio.create_task(engine.embed(texts))
            while engine.gateway.health()["open_requests"] == 0:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            os.kill(engine.gateway.health()["workers"][0]["pid"], signal.SIGKILL)
            assert (await asked).vectors == expected.vectors
            while len(deaths) == before:  # noqa: ASYNC110 - it may be told after the last vector
                await asyncio.sleep(0.005)


async def test_a_poisonous_text_is_given_up_alone(scripted: Any) -> None:
    model = scripted(die_on=POISON, step_delay_ms=2)
    async with Engine(str(model), max_request_deaths=2) as engine:
        good = asyncio.create_task(engine.embed([f"good {i}" for i in range(20)]))
        bad = asyncio.create_task(engine.embed([[POISON, 5]]))
        with pytest.raises(errors.WorkerDied):
            await bad
        assert len((await good).vectors) == 20


async def test_a_cancelled_request_leaves_nothing_behind(scripted: Any) -> None:
    async with Engine(str(scripted(step_delay_ms=20)), prefill_step_size=16) as engine:
        began: list[Any] = []
        ended: list[Any] = []
        engine.on(events.RequestStarted, began.append)
        engine.on(events.RequestFinished, ended.append)
        asked = asyncio.create_task(engine.embed(["word " * 9] * 500))
        while not began:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert engine.gateway.health()["open_requests"] == 0
        assert len((await engine.embed("after")).vectors) == 1
        assert [event.outcome for event in ended] == ["cancelled", "stop"]
        # What the next one met was empty: no sequence of the first is left in the worker.
        assert b'waiting_sequences{model="scripted"} 0.0' in engine.gateway.metrics()


async def test_a_stream_goes_on_beside_many_texts(scripted: Any) -> None:
    """The worker never has more of a request's texts than a few steps' worth, so that a stream that
    comes later gets its turn long before their end."""
    text = "Once upon a time. " * 3
    model = scripted(text=text, step_delay_ms=2)
    async with Engine(str(model), prefill_step_size=64) as engine:
        began: list[Any] = []
        engine.on(events.RequestStarted, began.append)
        asked = asyncio.create_task(engine.embed(["x" * 60] * 600))
        while not began:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        assert (await engine.complete("Hello", max_tokens=100)).text == text
        # It took some sixty steps; the texts take six hundred.
        assert not asked.done()
        assert len((await asked).vectors) == 600


async def test_figures_are_counted(scripted: Any) -> None:
    async with Engine(str(scripted())) as engine:
        await engine.embed(["abc", "de"])
        text = engine.gateway.metrics().decode()
    assert 'mlx_serving_pooled_texts_total{model="scripted"} 2.0' in text
    assert 'mlx_serving_prompt_tokens_total{model="scripted"} 5.0' in text
    assert 'mlx_serving_requests_total{model="scripted",outcome="stop"} 1.0' in text


async def test_a_full_queue_refuses(scripted: Any) -> None:
    async with Engine(str(scripted(step_delay_ms=20)), max_queue=1, prefill_step_size=16) as engine:
        asked = asyncio.create_task(engine.embed(["word " * 9] * 100))
        while engine.gateway.health()["open_requests"] == 0:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        with pytest.raises(errors.Overloaded):
            await engine.embed("x")
        asked.cancel()


async def test_an_end_is_added_where_the_folder_wants_one(tmp_path: Path) -> None:
    """A decoder that was made into an embedder takes its vector from the end-of-sequence token."""
    from model.test_pooled import write

    folder = write(tmp_path / "m")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "w59"}))
    spec = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**spec, "post_processor": None}))
    async with Engine(str(folder)) as engine:
        added = await engine.embed("w1 w2")
        by_hand = await engine.embed([[5, 6, 63]])
        cut = await engine.embed("w1 w2 w3", truncate=3)
    assert added.vectors == by_hand.vectors == cut.vectors
    assert added.usage.prompt_tokens == 3
