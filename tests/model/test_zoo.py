"""Every kind of architecture: one runner, mlx-lm's own tokens, whoever shares the batch."""

from __future__ import annotations

import random
from functools import lru_cache
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step

from mlx_serving.runtime.backend.arch import head_on_last
from mlx_serving.runtime.backend.kv import RowSlots
from mlx_serving.runtime.backend.runner import MLXRunner
from mlx_serving.runtime.backend.sampler import Sampler
from mlx_serving.runtime.backend.separate_rows import SeparateRows
from mlx_serving.runtime.core.plan import DecodeRow, PrefillChunk, RowStart, StepPlan
from mlx_serving.types import SamplingParams
from model import zoo
from model.driver import Job, make_runner, run

LENGTHS = (5, 23, 41, 1, 17)
TOKENS = 10
GREEDY = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)


def _prompts() -> list[tuple[int, ...]]:
    rng = random.Random(3)
    return [tuple(rng.randrange(1, zoo.VOCAB) for _ in range(n)) for n in LENGTHS]


PROMPTS = _prompts()


@lru_cache(maxsize=1)
def _built(name: str) -> tuple[Any, list[list[int]]]:
    """The model, and mlx-lm's own greedy tokens for each prompt."""
    model = zoo.build(name)
    return model, [
        [t for t, _ in generate_step(mx.array(p), model, max_tokens=TOKENS)] for p in PROMPTS
    ]


def _churn(sampling: SamplingParams = GREEDY) -> list[Job]:
    """Joins at different steps; one leaves early, so that another moves; one is paused a while."""
    return [
        Job(PROMPTS[0], sampling, leaves=9),
        Job(PROMPTS[1], sampling, joins=2, pauses=range(8, 14)),
        Job(PROMPTS[2], sampling, joins=3),
        Job(PROMPTS[3], sampling, joins=5),
        Job(PROMPTS[4], sampling, joins=6),
    ]


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_greedy_tokens_are_those_of_mlx_lm(name: str) -> None:
    model, expected = _built(name)
    assert len({t for tokens in expected for t in tokens}) > 8, "degenerate weights prove nothing"
    runner = make_runner(model, zoo.VOCAB)
    assert isinstance(runner.store, RowSlots)
    for i in (1, 2):
        alone = run(runner, [Job(PROMPTS[i], GREEDY)]).outcomes[0].tokens
        assert alone == expected[i], f"prompt {i} alone"
    for depth, chunk in ((2, 16), (3, 64)):
        result = run(runner, _churn(), depth=depth, prefill_step=chunk)
        assert result.moves() > 0
        for i, outcome in result.outcomes.items():
            left_early = i == 0
            tokens = expected[i][: len(outcome.tokens)] if left_early else expected[i]
            assert outcome.tokens == tokens, f"prompt {i}, depth {depth}"


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "deepseek_v3", "falcon_h1"])
def test_an_exact_batch_gives_the_same_tokens(name: str) -> None:
    model, expected = _built(name)
    runner = make_runner(model, zoo.VOCAB, exact_batch=True)
    result = run(runner, _churn(), depth=2)
    assert all(result.outcomes[i].tokens == expected[i] for i in range(1, len(PROMPTS)))


@pytest.mark.parametrize("name", ["llama", "qwen3_next"])
def test_preempted_sequences_give_the_same_tokens(name: str) -> None:
    model, expected = _built(name)
    jobs = [Job(p, GREEDY) for p in PROMPTS]
    result = run(make_runner(model, zoo.VOCAB), jobs, depth=2, capacity_tokens=128)
    assert len([s for plan in result.plans for s in plan.starts]) >= len(jobs)
    assert [result.outcomes[i].tokens for i in range(len(jobs))] == expected


@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "qwen3_next"])
def test_sampled_tokens_and_logprobs_do_not_depend_on_neighbours(name: str) -> None:
    model, _ = _built(name)
    runner = make_runner(model, zoo.VOCAB)
    wishes = [
        SamplingParams(temperature=0.8, seed=1, top_k=40, logprobs=3, max_tokens=TOKENS),
        SamplingParams(temperature=1.2, seed=2, top_p=0.8, max_tokens=TOKENS),
        SamplingParams(temperature=1.0, seed=3, min_p=0.02, logprobs=0, max_tokens=TOKENS),
        SamplingParams(temperature=0.0, repetition_penalty=1.5, logprobs=20, max_tokens=TOKENS),
        SamplingParams(temperature=0.7, seed=2**63 + 5, logit_bias={7: 3.0}, max_tokens=TOKENS),
    ]
    jobs = [Job(p, s, joins=i) for i, (p, s) in enumerate(zip(PROMPTS, wishes, strict=True))]
    together = run(runner, jobs, depth=2).outcomes
    for i, job in enumerate(jobs):
        alone = run(runner, [Job(job.prompt, job.sampling)]).outcomes[0]
        assert together[i].tokens == alone.tokens
        assert len(together[i].logprobs) == len(alone.logprobs)
        for a, b in zip(together[i].logprobs, alone.logprobs, strict=True):
            # Batched and single matrix products may round differently, and ties then reorder.
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
            assert a.top_logprobs == pytest.approx(b.top_logprobs, abs=1e-4)
    with_logprobs = together[0].logprobs
    assert len(with_logprobs) == TOKENS
    assert all(len(one.top_ids) == 3 for one in with_logprobs)


@pytest.mark.parametrize("name", zoo.RECURRENT)
def test_roll_back_returns_to_the_snapshot(name: str) -> None:
    """What speculation needs: snapshot, go on, restore, go on differently."""
    model, _ = _built(name)
    runner = make_runner(model, zoo.VOCAB)
    runner.launch(
        StepPlan(
            0,
            starts=tuple(RowStart(r, r, PROMPTS[r], LENGTHS[r], GREEDY) for r in (0, 1)),
            prefill=tuple(PrefillChunk(r, r, PROMPTS[r], 0, True) for r in (0, 1)),
        )
    ).wait()

    def decode(step: int, rows: dict[int, tuple[int, int]]) -> dict[int, int]:
        plan = tuple(DecodeRow(r, r, position, t) for r, (position, t) in rows.items())
        result = runner.launch(StepPlan(step, decode=plan)).wait()
        return {s.seq_id: s.token_ids[0] for s in result.sampled}

    at = LENGTHS[1]
    saved = runner.store.snapshot(1)
    wanted = decode(1, {0: (LENGTHS[0], 9), 1: (at, 7)})[1]
    decode(2, {1: (at + 1, 200)})
    runner.store.restore(1, saved)
    assert runner.store.length(1) == at
    again = decode(3, {0: (LENGTHS[0] + 1, 9), 1: (at, 7)})[1]
    assert again == wanted


@pytest.mark.parametrize("name", zoo.RECURRENT)
def test_an_idle_row_keeps_its_state_to_the_bit(name: str) -> None:
    model, _ = _built(name)
    runner = make_runner(model, zoo.VOCAB)
    runner.launch(
        StepPlan(
            0,
            starts=tuple(RowStart(r, r, PROMPTS[r], LENGTHS[r], GREEDY) for r in range(3)),
            prefill=tuple(PrefillChunk(r, r, PROMPTS[r], 0, True) for r in range(3)),
        )
    ).wait()

    def state() -> list[mx.array]:
        _, layers = runner.store.snapshot(1)
        arrays = [a for layer in layers for a in layer if a is not None]
        mx.eval(arrays)
        return arrays

    before = state()
    others = (DecodeRow(0, 0, LENGTHS[0], None), DecodeRow(2, 2, LENGTHS[2], None))
    runner.launch(StepPlan(1, decode=others)).wait()
    after = state()
    assert before and all(mx.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_head_sees_one_position_only() -> None:
    model = zoo.build("qwen3")
    tokens = mx.array([PROMPTS[1]])
    whole = model(tokens)[:, -1]
    assert head_on_last(model) is not None
    last = model(tokens)
    assert last.shape == (1, 1, zoo.VOCAB)
    assert mx.allclose(last[:, -1], whole, atol=1e-5)


def test_a_store_of_separate_rows_gives_the_same_tokens() -> None:
    """What architectures run on whose caches have no slab form."""
    model, expected = _built("qwen3_next")
    store = SeparateRows(model, 4)
    runner = MLXRunner(model, store, Sampler(zoo.VOCAB, (), 4), max_rows=4, backbone=None)
    result = run(runner, _churn(), depth=2)
    assert result.moves() > 0
    assert all(result.outcomes[i].tokens == expected[i] for i in range(1, len(PROMPTS)))


def test_a_runner_that_was_reset_starts_afresh() -> None:
    model, expected = _built("falcon_h1")
    runner = make_runner(model, zoo.VOCAB)
    start = RowStart(0, 9, PROMPTS[2], LENGTHS[2], GREEDY)
    runner.launch(StepPlan(0, starts=(start,), prefill=(PrefillChunk(0, 9, PROMPTS[2], 0, False),)))
    runner.reset()
    assert runner.store.arrays() == []
    result = run(runner, [Job(PROMPTS[1], GREEDY)])
    assert result.outcomes[0].tokens == expected[1]


def test_embeddings_may_stand_for_tokens() -> None:
    model = zoo.build("qwen3")
    runner = make_runner(model, zoo.VOCAB)
    tokens = mx.array([PROMPTS[1]])
    logits = []
    for row, embeddings in enumerate((None, model.model.embed_tokens(tokens))):
        runner.store.start(row, LENGTHS[1])
        logits.append(runner.forward_row(row, tokens, 0, embeddings))
    assert mx.array_equal(*logits)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "falcon_h1"])
def test_no_step_copies_a_slab(name: str) -> None:
    """Three steps deep, peak memory stays far under one more copy of the largest slab."""
    runner = make_runner(zoo.build(name), zoo.VOCAB)
    prompt = tuple(1 + i % 200 for i in range(20_000))
    rows = range(4)
    runner.launch(
        StepPlan(
            0,
            starts=tuple(RowStart(r, r, prompt, len(prompt), GREEDY) for r in rows),
            prefill=tuple(PrefillChunk(r, r, prompt[:16], 0, r < 3) for r in rows),
        )
    ).wait()
    largest = max(slab.nbytes for slab in runner.store.arrays())
    active = mx.get_active_memory()
    mx.reset_peak_memory()
    pending = []
    for step in range(6):
        chunk = PrefillChunk(3, 3, prompt[:16], 16 * (step + 1), False)
        decode = tuple(DecodeRow(r, r, 16 + step, None) for r in range(3))
        pending.append(runner.launch(StepPlan(step, prefill=(chunk,), decode=decode)))
        if len(pending) == 3:
            pending.pop(0).wait()
    for step_pending in pending:
        step_pending.wait()
    assert mx.get_peak_memory() - active < largest / 4
