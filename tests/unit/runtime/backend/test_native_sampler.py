"""The native choice is the reference's, token for token, whatever is asked and on every instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_serving.runtime import native
from mlx_serving.runtime.backend.native_sampler import NativeSampler
from mlx_serving.runtime.backend.sampler import Sampler
from mlx_serving.runtime.core.plan import RowStart
from mlx_serving.types import SamplingParams

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why())

EOS = (5, 6)
PROMPT = (1, 2, 2, 7)
STEPS = 3


def _isas() -> list[str]:
    from mlx_serving.runtime.native import _load

    return str(_load.require().isas()).split(",") if native.available() else [""]


@pytest.fixture(params=_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    from mlx_serving.runtime.native import _load

    assert _load.require().force_isa(request.param)
    yield request.param
    _load.require().force_isa("")


params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-9, 0.3, 1.0, 2.0]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.05]),
    top_k=st.sampled_from([0, 1, 4, 70, 1200, 100_000]),
    min_p=st.sampled_from([0.0, 1e-6, 0.01, 0.2]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    presence_penalty=st.sampled_from([0.0, 1.5, -0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.7]),
    logit_bias=st.sampled_from([{}, {7: 4.0, 3: -100.0}]),
    seed=st.integers(0, 2**64 - 1),
    choice=st.sampled_from([0, 1]),
    logprobs=st.sampled_from([None, 3]),
    min_tokens=st.sampled_from([0, 2]),
    stop_token_ids=st.sampled_from([(), (11, 12)]),
)


def _logits(lines: int, vocab: int, spread: float, seed: int) -> mx.array:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(lines, vocab)).astype(np.float32) * spread
    return mx.array(np.round(x, 1) if seed % 3 == 0 else x)  # ties, sometimes


def _mask(vocab: int, rng: np.random.Generator) -> bytes:
    width = -(-vocab // 32) * 4
    bits = rng.integers(0, 256, width, dtype=np.uint8)
    return bytes(bits) if rng.integers(2) else bytes(width)  # random, or nothing allowed


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    batch=st.lists(st.none() | params, min_size=1, max_size=5),
    vocab=st.sampled_from([17, 96, 999, 4096, 5003]),
    spread=st.sampled_from([0.0, 0.5, 3.0, 30.0]),
    seed=st.integers(0, 10_000),
    constrained=st.booleans(),
)
def test_chooses_as_the_reference_does(
    isa: str,
    batch: list[SamplingParams | None],
    vocab: int,
    spread: float,
    seed: int,
    constrained: bool,
) -> None:
    both = Sampler(vocab, EOS, len(batch)), NativeSampler(vocab, EOS, len(batch))
    rows = [None if p is None else i for i, p in enumerate(batch)]
    for sampler in both:
        for row, p in enumerate(batch):
            if p is not None:
                sampler.start(RowStart(row, row, PROMPT, len(PROMPT), p))
    rng = np.random.default_rng(seed)
    for step in range(STEPS):
        x = _logits(len(batch), vocab, spread, seed + step)
        masks = {0: _mask(vocab, rng)} if constrained else None
        positions = [len(PROMPT) + step] * len(batch)
        want, got = (s.sample(x, rows, positions, masks) for s in both)
        assert got.tokens.tolist() == want.tokens.tolist()
        assert got.logprobs() == want.logprobs()


def test_a_large_vocabulary_at_every_usual_setting(isa: str) -> None:
    vocab, lines = 49_152, 8
    wishes = [
        SamplingParams(temperature=1.0, seed=1),
        SamplingParams(temperature=0.7, top_p=0.95, seed=2),
        SamplingParams(temperature=1.0, top_p=0.9, top_k=40, seed=3),
        SamplingParams(temperature=1.0, min_p=0.05, seed=4),
        SamplingParams(temperature=1.5, top_p=0.999, seed=5),
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1.0, top_k=2000, seed=6),
        SamplingParams(temperature=1.0, frequency_penalty=1.0, seed=7),
    ]
    both = Sampler(vocab, (), lines), NativeSampler(vocab, (), lines)
    for sampler in both:
        for row, p in enumerate(wishes):
            sampler.start(RowStart(row, row, PROMPT, len(PROMPT), p))
    for step in range(4):
        x = _logits(lines, vocab, 2.5, 1 + 3 * step)
        draws = [s.sample(x, range(lines), [9 + step] * lines) for s in both]
        assert draws[0].tokens.tolist() == draws[1].tokens.tolist()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_gives_a_token(isa: str, bad: float) -> None:
    vocab = 300
    wishes = [
        SamplingParams(temperature=1.0, top_p=0.9, top_k=5, min_p=0.1, seed=1),
        SamplingParams(temperature=1.0, seed=1),
        SamplingParams(temperature=0.0),
    ]
    sampler = NativeSampler(vocab, (), len(wishes))
    for row, p in enumerate(wishes):
        sampler.start(RowStart(row, row, PROMPT, len(PROMPT), p))
    x = np.zeros((3, vocab), np.float32)
    for some in (slice(100, 101), slice(None)):
        x[:, some] = bad
        tokens = sampler.sample(mx.array(x), range(3), [9] * 3).tokens.tolist()
        assert all(0 <= t < vocab for t in tokens)


def test_half_precision_and_strided_logits_are_taken() -> None:
    x = mx.random.normal((4, 3, 100), key=mx.random.key(2)).astype(mx.bfloat16)
    sampler = NativeSampler(100, (), 4)
    for row in range(4):
        sampler.start(RowStart(row, row, PROMPT, len(PROMPT), SamplingParams(temperature=0.0)))
    got = sampler.sample(x[:, 1], range(4), [9] * 4).tokens
    assert got.tolist() == mx.argmax(x[:, 1], axis=-1).tolist()


def test_lines_must_name_rows_that_are_there() -> None:
    from mlx_serving.runtime.native import ops

    x = mx.zeros((1, 8))
    with pytest.raises(ValueError, match="row that is not there"):
        ops.sample(x, ops.sample_lines([ops.SampleLine(bias=0)]), [0])
    with pytest.raises(ValueError, match="one description"):
        ops.sample(x, ops.sample_lines([]), [0])
    with pytest.raises(ValueError, match="rows, vocabulary"):
        ops.sample(x, ops.sample_lines([ops.SampleLine()]), [0], bias=mx.zeros((1, 4)))
