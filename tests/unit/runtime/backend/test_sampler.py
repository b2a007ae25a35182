"""The sampler against a slow, obvious oracle, and against itself in other company."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_serving.runtime.backend.sampler import Sampler, base_key
from mlx_serving.runtime.core.plan import RowStart
from mlx_serving.types import SamplingParams

VOCAB = 96
EOS = (5, 6)
PROMPT = (1, 2, 2, 7)
OUTPUT = (3, 3, 9)
POSITION = len(PROMPT) + len(OUTPUT)


def start(row: int, sampling: SamplingParams, output: tuple[int, ...] = OUTPUT) -> RowStart:
    return RowStart(row, row, PROMPT + output, len(PROMPT), sampling)


def logits(rows: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, VOCAB)).astype(np.float32) * 3


def draw(
    params: list[SamplingParams], x: np.ndarray, position: int = POSITION
) -> tuple[list[int], dict[int, Any]]:
    sampler = Sampler(x.shape[-1], EOS, len(params))
    for row, p in enumerate(params):
        sampler.start(start(row, p))
    result = sampler.sample(
        mx.array(np.ascontiguousarray(x)), range(len(params)), [position] * len(params)
    )
    return result.tokens.tolist(), result.logprobs()


# -- the oracle ---------------------------------------------------------------------------


def edited(x: np.ndarray, p: SamplingParams, position: int) -> list[float]:
    y = [float(v) for v in x]
    for token, bias in p.logit_bias.items():
        y[token] += bias
    for token in set(PROMPT + OUTPUT):
        y[token] = (
            y[token] / p.repetition_penalty if y[token] > 0 else y[token] * p.repetition_penalty
        )
    for token in set(OUTPUT):
        y[token] -= p.presence_penalty + p.frequency_penalty * OUTPUT.count(token)
    if position - len(PROMPT) < p.min_tokens:
        for token in (*p.stop_token_ids, *(() if p.ignore_eos else EOS)):
            y[token] = -math.inf
    return y


def allowed(y: list[float], p: SamplingParams) -> set[int]:
    """Token ids that may be drawn at a temperature above 0."""
    y = [v / p.temperature for v in y]
    ranked = sorted(range(len(y)), key=lambda t: -y[t])
    if p.top_k:
        ranked = ranked[: p.top_k]
    weights = {t: math.exp(y[t] - y[ranked[0]]) for t in ranked}
    total, reached, kept = sum(weights.values()), 0.0, set()
    for t in ranked:
        if reached >= p.top_p * total:
            break
        kept.add(t)
        reached += weights[t]
    return {t for t in kept if weights[t] >= p.min_p}


def gumbel_choice(y: list[float], p: SamplingParams, position: int) -> int:
    high, low = base_key(p.seed, p.choice)
    key = mx.array([high, low ^ position], dtype=mx.uint32)
    noise = mx.random.gumbel((len(y),), key=key).tolist()
    scores = {t: y[t] / p.temperature + noise[t] for t in allowed(y, p)}
    return max(scores, key=lambda t: scores[t])


params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 0.05]),
    top_k=st.sampled_from([0, 1, 4, 70, 500]),
    min_p=st.sampled_from([0.0, 0.01, 0.2]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    presence_penalty=st.sampled_from([0.0, 1.5, -0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.7]),
    logit_bias=st.sampled_from([{}, {7: 4.0, 3: -100.0}]),
    seed=st.sampled_from([0, 17, 2**63 + 1]),
    choice=st.sampled_from([0, 1]),
    logprobs=st.sampled_from([None, 0, 5]),
    min_tokens=st.sampled_from([0, 2, 8]),
    ignore_eos=st.booleans(),
    stop_token_ids=st.sampled_from([(), (11, 12)]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(params, min_size=1, max_size=4), st.integers(0, 1000))
def test_each_row_is_the_oracles(batch: list[SamplingParams], seed: int) -> None:
    x = logits(len(batch), seed)
    tokens, logprobs = draw(batch, x)
    for row, p in enumerate(batch):
        y = edited(x[row], p, POSITION)
        if p.temperature == 0:
            assert y[tokens[row]] == pytest.approx(max(y), abs=1e-5)
        else:
            assert tokens[row] == gumbel_choice(y, p, POSITION)
        if p.logprobs is None:
            assert row not in logprobs
            continue
        raw = x[row].astype(np.float64)
        want = raw - np.log(np.exp(raw).sum())
        assert logprobs[row].logprob == pytest.approx(want[tokens[row]], abs=1e-4)
        best = np.argsort(-want)[: p.logprobs]
        assert list(logprobs[row].top_ids) == best.tolist()
        assert list(logprobs[row].top_logprobs) == pytest.approx(want[best].tolist(), abs=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.lists(params, min_size=2, max_size=6), st.integers(0, 1000))
def test_a_row_does_not_depend_on_its_neighbours(batch: list[SamplingParams], seed: int) -> None:
    """Bits included: alone, together, and in reverse order."""
    x = logits(len(batch), seed)
    together = draw(batch, x)
    backwards = draw(batch[::-1], x[::-1])
    for row, p in enumerate(batch):
        alone = draw([p], x[row : row + 1])
        mirrored = len(batch) - 1 - row
        assert together[0][row] == alone[0][0] == backwards[0][mirrored]
        assert together[1].get(row) == alone[1].get(0) == backwards[1].get(mirrored)


# -- distributions ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p", "kept"),
    [
        (SamplingParams(), 8),
        (SamplingParams(top_k=3), 3),
        (SamplingParams(top_p=0.7), 3),
        (SamplingParams(min_p=0.2), 4),
        (SamplingParams(top_k=4, top_p=0.6), 2),
    ],
)
def test_frequencies_are_the_probabilities(p: SamplingParams, kept: int) -> None:
    """Over positions, as one stream draws: within 5 standard deviations."""
    probabilities = np.array([0.4, 0.25, 0.15, 0.1, 0.05, 0.03, 0.015, 0.005])
    n = 4000
    sampler = Sampler(8, (), 1)
    sampler.start(RowStart(0, 0, (1,), 1, p))
    x = mx.broadcast_to(mx.log(mx.array(probabilities))[None], (n, 8))
    drawn = np.array(sampler.sample(x, [0] * n, range(n)).tokens)
    expected = np.where(np.arange(8) < kept, probabilities, 0)
    expected = expected / expected.sum()
    counts = np.bincount(drawn, minlength=8)
    deviation = np.sqrt(n * expected * (1 - expected))
    assert np.all(np.abs(counts - n * expected) <= 5 * deviation + 1e-9)


def test_keys_differ_by_seed_choice_and_position() -> None:
    flat = np.zeros((1, VOCAB), np.float32)

    def stream(seed: int, choice: int) -> tuple[int, ...]:
        p = SamplingParams(seed=seed, choice=choice)
        return tuple(draw([p], flat, position)[0][0] for position in range(12))

    seeds = (0, 1, 2**32, 2**32 + 1, 2**63)
    streams = {stream(seed, choice) for seed in seeds for choice in (0, 1)}
    assert len(streams) == 10
    assert all(len(set(s)) > 6 for s in streams)
    assert stream(1, 0) == stream(1, 0)


# -- the row's life -----------------------------------------------------------------------


def test_penalties_count_what_is_drawn() -> None:
    """A strong frequency penalty on a flat distribution never repeats a token."""
    sampler = Sampler(VOCAB, (), 2)
    strong = SamplingParams(temperature=0.0, frequency_penalty=2.0)
    sampler.start(start(0, strong, output=()))
    sampler.start(start(1, SamplingParams(temperature=0.0)))
    x = mx.zeros((2, VOCAB))
    seen = [sampler.sample(x, [0, 1], [p, p]).tokens.tolist() for p in range(4, 24)]
    assert len({first for first, _ in seen}) == 20
    assert {second for _, second in seen} == {0}


def test_a_windows_penalties_forget() -> None:
    """The one likely token comes again as soon as the window has lost it."""
    sampler = Sampler(VOCAB, EOS, 1)
    told = SamplingParams(temperature=0.0, repetition_penalty=100.0, penalty_window=2)
    sampler.start(start(0, told, output=()))
    x = np.zeros((1, VOCAB), np.float32)
    x[0, :12] = np.arange(12, 0, -1)
    drawn = [
        sampler.sample(mx.array(x), [0], [len(PROMPT) + i]).tokens.tolist()[0] for i in range(6)
    ]
    # The prompt ends with 2, 7.
    assert drawn == [0, 1, 2, 0, 1, 2]


def test_a_moved_row_keeps_its_counts_and_its_numbers() -> None:
    p = SamplingParams(temperature=0.9, seed=3, presence_penalty=2.0, frequency_penalty=1.0)
    x = mx.array(logits(1))
    stay, move = Sampler(VOCAB, (), 4), Sampler(VOCAB, (), 4)
    for sampler in (stay, move):
        sampler.start(start(3, p))
        sampler.start(start(0, SamplingParams(frequency_penalty=0.5)))
        sampler.sample(x, [3], [POSITION])
    move.free(0)
    move.move(3, 0)
    for position in range(POSITION + 1, POSITION + 8):
        a = stay.sample(x, [3], [position]).tokens.item()
        assert a == move.sample(x, [0], [position]).tokens.item()


def test_a_reused_row_starts_afresh() -> None:
    x = mx.array(logits(1))
    p = SamplingParams(temperature=0.0, frequency_penalty=2.0)
    used, fresh = Sampler(VOCAB, (), 1), Sampler(VOCAB, (), 1)
    used.start(start(0, p))
    for position in range(7, 12):
        used.sample(x, [0], [position])
    used.free(0)
    used.start(start(0, p))
    fresh.start(start(0, p))
    for position in range(7, 12):
        a = used.sample(x, [0], [position]).tokens.item()
        assert a == fresh.sample(x, [0], [position]).tokens.item()


def test_min_tokens_ends_when_it_is_reached() -> None:
    """The ban goes by position, without the row being described again."""
    sampler = Sampler(VOCAB, EOS, 1)
    p = SamplingParams(temperature=0.0, min_tokens=5, stop_token_ids=(8,))
    sampler.start(start(0, p, output=()))
    x = np.zeros((1, VOCAB), np.float32)
    x[0, [5, 6, 8]] = 9.0
    drawn = [sampler.sample(mx.array(x), [0], [4 + i]).tokens.item() for i in range(7)]
    assert drawn == [0, 0, 0, 0, 0, 5, 5]


def test_lines_without_a_row_are_computed_for_nobody() -> None:
    sampler = Sampler(VOCAB, (), 3)
    p = SamplingParams(temperature=0.7, seed=8, top_p=0.9, logprobs=2)
    sampler.start(start(2, p))
    x = logits(3)
    got = sampler.sample(mx.array(x), [None, None, 2], [0, 0, POSITION])
    alone, logprobs = draw([p], x[2:])
    assert got.tokens.tolist()[2] == alone[0]
    assert got.logprobs() == {2: logprobs[0]}


def test_half_precision_logits_are_sampled_in_single() -> None:
    x = mx.array(logits(1)).astype(mx.bfloat16)
    p = SamplingParams(temperature=1.0, seed=4, logprobs=3)
    sampler = Sampler(VOCAB, (), 1)
    sampler.start(start(0, p))
    got = sampler.sample(x, [0], [POSITION])
    assert got.tokens.tolist() == draw([p], np.array(x.astype(mx.float32)))[0]
