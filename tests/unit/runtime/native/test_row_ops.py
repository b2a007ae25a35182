"""Norm, rope and gated activations."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_serving.runtime.native import ops, reference

QUICK = settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
TOLERANCE = {mx.float32: 3e-6, mx.float16: 4e-3, mx.bfloat16: 3e-2}
dtypes = st.sampled_from(tuple(TOLERANCE))


def close(got: mx.array, expected: np.ndarray, dtype: mx.Dtype) -> None:
    assert got.dtype == dtype
    error = np.abs(np.array(got.astype(mx.float32)) - expected)
    assert (error <= TOLERANCE[dtype] * (1 + np.abs(expected))).all(), error.max()


@QUICK
@given(rows=st.integers(1, 9), k=st.integers(1, 200), dtype=dtypes, weighted=st.booleans())
def test_rms_norm(isa: str, rows: int, k: int, dtype: mx.Dtype, weighted: bool) -> None:
    x = (mx.random.normal((rows, k), key=mx.random.key(k)) * 3).astype(dtype)
    weight = mx.random.normal((k,), key=mx.random.key(1)) if weighted else None
    close(ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), dtype)


@QUICK
@given(
    heads=st.integers(1, 4),
    length=st.integers(1, 9),
    half=st.integers(1, 40),
    extra=st.integers(0, 5),
    traditional=st.booleans(),
    dtype=dtypes,
)
def test_rope(
    isa: str, heads: int, length: int, half: int, extra: int, traditional: bool, dtype: mx.Dtype
) -> None:
    x = mx.random.normal((2, length, heads, 2 * half + extra), key=mx.random.key(half))
    x = x.astype(dtype).transpose(0, 2, 1, 3)
    inv_freq = [10000.0 ** (-i / half) for i in range(half)]
    offsets = [600, 3]
    got = ops.rope(x, mx.array(offsets), ops.rope_table(inv_freq, traditional, 1.1))
    close(got, reference.rope(x, offsets, inv_freq, traditional, 1.1), dtype)


def test_rope_of_a_position_does_not_depend_on_the_call() -> None:
    table = ops.rope_table([0.5**i for i in range(16)], False)
    x = mx.random.normal((1, 2, 40, 32))
    whole = np.array(ops.rope(x, 7, table))
    for i in range(0, 40, 9):
        assert (
            np.array(ops.rope(x[:, :, i : i + 1], 7 + i, table))[:, :, 0] == whole[:, :, i]
        ).all()


def test_rope_layers_match_mlx_lm() -> None:
    import mlx.nn as nn
    from mlx_lm.models.rope_utils import initialize_rope

    from mlx_serving.runtime.native import layers

    llama3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    longrope = {
        "rope_type": "longrope",
        "original_max_position_embeddings": 32,
        "short_factor": [1.0] * 32,
        "long_factor": [1.5] * 32,
    }
    scalings = [
        None,
        {"rope_type": "linear", "factor": 2.0},
        llama3,
        yarn,
        longrope,
        {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    ]
    x = mx.random.normal((2, 3, 5, 64))
    for scaling in scalings:
        rope = initialize_rope(64, 10000.0, False, scaling, 128)
        expected = np.array(rope(x, offset=mx.array([9, 70])))
        table = layers.rope_table(rope)
        got = np.array(ops.rope(x, mx.array([9, 70]), table))
        assert np.abs(got - expected).max() < 5e-5, scaling
    assert layers.rope_table(nn.ALiBi()) is None


@pytest.mark.parametrize("act", ["silu", "gelu_tanh", "gelu_erf"])
@QUICK
@given(n=st.integers(1, 70), dtype=dtypes)
def test_gated(isa: str, act: ops.Activation, n: int, dtype: mx.Dtype) -> None:
    gate = (mx.random.normal((3, n), key=mx.random.key(n)) * 4).astype(dtype)
    up = mx.random.normal((3, n), key=mx.random.key(n + 1)).astype(dtype)
    close(ops.gated(gate, up, act), reference.gated(gate, up, act), dtype)


def test_gated_at_the_ends_of_the_range(isa: str) -> None:
    gate = mx.array([[-np.inf, -1e4, -100.0, -88.0, 0.0, 88.0, 1e4, np.nan]])
    got = np.array(ops.gated(gate, mx.ones_like(gate), "silu"))[0]
    assert np.abs(got[1:5]).max() < 1e-30
    assert (got[5:7] == [88.0, 1e4]).all()
    assert np.isnan(got[7])
