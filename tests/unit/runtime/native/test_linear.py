from __future__ import annotations

import itertools

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_serving.runtime.native import ops, reference

QUICK = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
FLOATS = {"mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}
"""Group size and bits of what has no biases."""
FORMATS = (2, 3, 4, 5, 6, 8, *FLOATS)
Format = int | str
ROUNDING = {mx.float32: 2e-6, mx.float16: 2e-3, mx.bfloat16: 1.2e-2}


def quantized(n: int, k: int, group: int, bits: Format, dtype=mx.float32, seed: int = 0):
    w = mx.random.normal((n, k), key=mx.random.key(seed)) * 0.05
    if isinstance(bits, str):
        form = FLOATS[bits]
        q, s = mx.quantize(w, *form, mode=bits)
        return ops.pack_quantized(q, s, None, *form), reference.dequantize(q, s, None, *form)
    q, s, b = mx.quantize(w, group_size=group, bits=bits)
    s, b = s.astype(dtype), b.astype(dtype)
    return ops.pack_quantized(q, s, b, group, bits), reference.dequantize(q, s, b, group, bits)


def bits_of(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).view(np.uint32)


@QUICK
@given(data=st.data())
def test_matches_the_reference(isa: str, data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from(FORMATS))
    group = data.draw(st.sampled_from((32, 64, 128)))
    group = FLOATS[bits][0] if isinstance(bits, str) else group
    mode = data.draw(st.sampled_from(("exact", "fast", "f32")))
    rows = data.draw(st.integers(1, 19))
    n = data.draw(st.integers(1, 70))
    k = group * data.draw(st.integers(1, 5))
    k += k % 32  # whole words
    dtype = data.draw(st.sampled_from(DTYPES))
    packed, w = quantized(n, k, group, bits, data.draw(st.sampled_from(DTYPES)))
    x = mx.random.normal((rows, k), key=mx.random.key(data.draw(st.integers(0, 99)))).astype(dtype)
    expected = reference.linear(x, w, None, "f32" if bits == "mxfp8" else mode, group)
    got = np.array(ops.linear(x, packed, None, mode).astype(mx.float32))
    # A value half-way between two steps may round to either: one step of one group.
    step = {"exact": 2e-4, "fast": 2e-2, "f32": 0.0}[mode]
    scale = np.abs(w).sum(-1).max()
    assert np.abs(got - expected).max() <= (step * 0.2 + ROUNDING[dtype]) * max(scale, 1.0)


@pytest.mark.parametrize(
    "bits,mode", list(itertools.product((4, 8, *FLOATS), ("exact", "fast", "f32")))
)
def test_a_row_does_not_depend_on_its_neighbours(isa: str, bits: Format, mode: ops.Mode) -> None:
    packed, _ = quantized(200, 256, 32, bits)
    x = mx.random.normal((150, 256), key=mx.random.key(1))
    full = bits_of(ops.linear(x, packed, None, mode))
    for count in (1, 2, 3, 4, 7, 8, 9, 33, 97):
        start = 150 - count
        assert (bits_of(ops.linear(x[start:], packed, None, mode)) == full[start:]).all(), count


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_weights(isa: str, dtype: mx.Dtype) -> None:
    w = mx.random.normal((77, 51), key=mx.random.key(2)).astype(dtype)
    x = mx.random.normal((23, 51), key=mx.random.key(3))
    packed = ops.pack_dense(w)
    full = ops.linear(x, packed)
    expected = reference.linear(x, np.array(w.astype(mx.float32)))
    assert np.abs(np.array(full) - expected).max() < 1e-5
    for count in (1, 2, 5, 11):
        assert (bits_of(ops.linear(x[:count], packed)) == bits_of(full)[:count]).all()


def test_instruction_sets_with_fma_agree_bitwise() -> None:
    from mlx_serving.runtime.native import _load

    native = _load.require()
    names = [n for n in native.isas().split(",") if n != "generic"]
    packed, _ = quantized(64, 320, 32, 4)
    x = mx.random.normal((9, 320), key=mx.random.key(4))
    results = []
    for name in names:
        native.force_isa(name)
        results.append([bits_of(ops.linear(x, packed, None, m)) for m in ("exact", "fast", "f32")])
    native.force_isa("")
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert (a == b).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("mode", ["exact", "fast", "f32"])
def test_what_is_not_finite_stays_in_its_row(isa: str, bad: float, mode: ops.Mode) -> None:
    packed, _ = quantized(40, 128, 32, 4)
    x = np.random.default_rng(0).normal(size=(9, 128)).astype(np.float32)
    clean = bits_of(ops.linear(mx.array(x), packed, None, mode))
    x[4, 70] = bad
    got = np.array(ops.linear(mx.array(x), packed, None, mode))
    assert not np.isfinite(got[4]).any()
    others = [i for i in range(9) if i != 4]
    assert (got.view(np.uint32)[others] == clean[others]).all()


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 1e-30, 1e30])
def test_extreme_magnitudes_stay_finite(isa: str, value: float) -> None:
    packed, w = quantized(16, 64, 32, 8)
    x = mx.full((1, 64), value)
    got = np.array(ops.linear(x, packed))
    bound = abs(value) * float(np.abs(w).sum(-1).max()) * 1.01 + 1e-37
    assert (np.abs(got) <= bound).all()


def test_strided_input_bias_and_slices(isa: str) -> None:
    packed, w = quantized(96, 64, 32, 4)
    x = mx.random.normal((64, 3, 5), key=mx.random.key(5)).transpose(2, 1, 0)
    bias = mx.random.normal((96,), key=mx.random.key(6))
    got = ops.linear(x, packed, bias, "f32")
    assert got.shape == (5, 3, 96)
    flat = mx.contiguous(x).reshape(15, 64)
    expected = reference.linear(flat, w, bias).reshape(5, 3, 96)
    assert np.abs(np.array(got) - expected).max() < 1e-5
    part = ops.linear(x, packed.slice(32, 80), bias[32:80], "f32")
    assert (bits_of(part) == bits_of(got)[..., 32:80]).all()


@pytest.mark.parametrize("bits", FORMATS)
def test_the_reference_reads_mlxs_formats(bits: Format) -> None:
    w = mx.random.normal((24, 128), key=mx.random.key(9)) * mx.array([1e-3, 1.0, 30.0] * 8)[:, None]
    mode, group, width = "affine", 32, bits
    if isinstance(bits, str):
        mode, (group, width) = bits, FLOATS[bits]
    parts = mx.quantize(w, group, width, mode=mode)
    q, s, b = parts if len(parts) == 3 else (*parts, None)
    want = mx.dequantize(q, s, b, group, width, mode=mode, dtype=mx.float32)
    got = reference.dequantize(q, s, b, group, width)
    assert np.abs(got - np.array(want.astype(mx.float32))).max() < 1e-6


@pytest.mark.parametrize("bits", FORMATS)
def test_embed_gives_dequantised_rows(isa: str, bits: Format) -> None:
    packed, w = quantized(50, 128, 32, bits)
    ids = mx.array([[3, 49], [0, 17]])
    got = np.array(ops.embed(ids, packed, mx.float32))
    assert np.allclose(got, w[np.array(ids)], atol=1e-7)


def test_an_id_that_is_not_there_is_refused() -> None:
    # Once: each evaluation that fails may leave MLX waiting for one task more, at the end for ever.
    packed, _ = quantized(50, 128, 32, 4)
    with pytest.raises(RuntimeError):
        mx.eval(ops.embed(mx.array([50]), packed, mx.float32))


@QUICK
@given(data=st.data())
def test_rows_meet_their_experts(isa: str, data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from((3, 4, 8, 16, *FLOATS)))
    mode = data.draw(st.sampled_from(("exact", "fast", "f32")))
    experts, n, k = data.draw(st.integers(1, 7)), 16 * data.draw(st.integers(1, 5)), 96
    rows = data.draw(st.integers(1, 40))
    chosen = data.draw(st.lists(st.integers(0, experts - 1), min_size=rows, max_size=rows))
    if bits == 16:
        dense = mx.random.normal((experts * n, k), key=mx.random.key(1))
        packed, w = ops.pack_dense(dense), np.array(dense)
    else:
        packed, w = quantized(experts * n, k, 32, bits)
    x = mx.random.normal((rows, k), key=mx.random.key(data.draw(st.integers(0, 99))))
    ids = mx.array(chosen)
    got = np.array(ops.gather_linear(x, ids, packed, n, mode))
    each = list(w.reshape(experts, n, k))
    group = FLOATS[bits][0] if isinstance(bits, str) else 32
    as_they_are = bits in (16, "mxfp8")
    want = reference.gather_linear(x, chosen, each, "f32" if as_they_are else mode, group)
    step = {"exact": 2e-4, "fast": 2e-2, "f32": 2e-6}[mode]
    assert np.abs(got - want).max() <= step * 0.2 * max(np.abs(w).sum(-1).max(), 1.0)
    for row in range(0, rows, 7):  # the same bits alone
        alone = ops.gather_linear(x[row : row + 1], ids[row : row + 1], packed, n, mode)
        assert (bits_of(alone)[0] == got[row].view(np.uint32)).all()


def test_an_expert_that_is_not_there_is_refused() -> None:
    packed, _ = quantized(32, 64, 32, 4)
    x = mx.zeros((2, 64))
    with pytest.raises(RuntimeError):
        mx.eval(ops.gather_linear(x, mx.array([0, 2]), packed, 16))
    with pytest.raises(ValueError, match="multiple of 16"):
        ops.gather_linear(x, mx.array([0, 1]), packed, 8)
    with pytest.raises(ValueError, match="for each row"):
        ops.gather_linear(x, mx.array([0]), packed, 16)


def test_wrong_shapes_are_refused() -> None:
    packed, _ = quantized(16, 64, 32, 4)
    with pytest.raises(ValueError, match="last axis"):
        ops.linear(mx.zeros((1, 65)), packed)
    with pytest.raises(ValueError, match="mode"):
        ops.linear(mx.zeros((1, 64)), packed, None, "best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="multiple of 16"):
        packed.slice(8, 16)
    with pytest.raises(ValueError):
        ops.pack_quantized(mx.zeros((4, 4), mx.uint32), mx.zeros((4, 1)), mx.zeros((4, 1)), 16, 4)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bits_do_not_depend_on_threads(threads: int) -> None:
    from mlx_serving.runtime import native

    packed, _ = quantized(300, 256, 32, 4)
    x = mx.random.normal((70, 256), key=mx.random.key(7))
    before = native.threads()
    full = bits_of(ops.linear(x, packed))
    native.set_threads(threads)
    try:
        assert (bits_of(ops.linear(x, packed)) == full).all()
    finally:
        native.set_threads(before)
