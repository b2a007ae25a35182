from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_serving.runtime.native import ops, reference

QUICK = settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def slabs(slots: int, heads: int, capacity: int, d: int, dv: int, dtype=mx.float32):
    k = mx.random.normal((slots, heads, capacity, d), key=mx.random.key(1)).astype(dtype)
    v = mx.random.normal((slots, heads, capacity, dv), key=mx.random.key(2)).astype(dtype)
    mx.eval(k, v)
    return k, v


def kept(x: mx.array, bits: int, group: int) -> tuple[mx.array, ops.KVCode]:
    """Vectors along the last axis as the words of a quantised slab."""
    codes, *affine = mx.quantize(x, group, bits)
    words = mx.concatenate([codes, mx.concatenate(affine, -1).view(mx.uint32)], -1)
    mx.eval(words)
    return words, (bits, group, x.shape[-1], x.dtype)


def read_back(x: mx.array, bits: int, group: int) -> mx.array:
    wide = [
        a.astype(mx.float32) if a.dtype != mx.uint32 else a for a in mx.quantize(x, group, bits)
    ]
    return mx.dequantize(*wide, group, bits)


@QUICK
@given(data=st.data())
def test_matches_the_reference(isa: str, data: st.DataObject) -> None:
    kv_heads = data.draw(st.integers(1, 3))
    heads = kv_heads * data.draw(st.integers(1, 5))
    d, dv = (16 * data.draw(st.integers(1, 6)) for _ in range(2))
    length = data.draw(st.sampled_from((1, 2, 5, 17, 33)))
    offsets = data.draw(st.lists(st.integers(0, 400 - length), min_size=1, max_size=3))
    window = data.draw(st.sampled_from((0, 0, 1, 7, 100)))
    dtype = data.draw(st.sampled_from((mx.float32, mx.float16, mx.bfloat16)))
    sinks = mx.random.normal((heads,)) if data.draw(st.booleans()) else None
    k, v = slabs(4, kv_heads, 400, d, dv, dtype)
    rows = [3, 0, 2][: len(offsets)]
    q = mx.random.normal((len(offsets), length, heads, d), key=mx.random.key(3))
    q = q.transpose(0, 2, 1, 3)
    got = ops.attention(q, k, v, mx.array(rows), mx.array(offsets), d**-0.5, window, sinks)
    expected = reference.attention(q, k, v, rows, offsets, d**-0.5, window, sinks)
    assert np.abs(np.array(got) - expected).max() < 1e-5


@QUICK
@given(data=st.data())
def test_quantised_slabs_match_the_reference(isa: str, data: st.DataObject) -> None:
    kv_heads = data.draw(st.integers(1, 3))
    heads = kv_heads * data.draw(st.integers(1, 5))
    forms = [
        (data.draw(st.sampled_from((8, 4))), data.draw(st.sampled_from((32, 64)))) for _ in "kv"
    ]
    d, dv = (group * data.draw(st.integers(1, 3)) for _, group in forms)
    length = data.draw(st.sampled_from((1, 2, 5, 17, 33)))
    offsets = data.draw(st.lists(st.integers(0, 400 - length), min_size=1, max_size=3))
    window = data.draw(st.sampled_from((0, 0, 1, 7, 100)))
    dtype = data.draw(st.sampled_from((mx.float32, mx.float16, mx.bfloat16)))
    k, v = slabs(4, kv_heads, 400, d, dv, dtype)
    (words_k, code_k), (words_v, code_v) = (kept(x, *f) for x, f in zip((k, v), forms, strict=True))
    if data.draw(st.booleans()):  # keys alone are quantised
        words_v, code_v, seen_v = v, None, v
    else:
        seen_v = read_back(v, *forms[1])
    rows = [3, 0, 2][: len(offsets)]
    q = mx.random.normal((len(offsets), length, heads, d), key=mx.random.key(3))
    q = q.transpose(0, 2, 1, 3)
    where = mx.array(rows), mx.array(offsets)
    got = ops.attention(q, words_k, words_v, *where, d**-0.5, window, None, code_k, code_v)
    seen_k = read_back(k, *forms[0])
    expected = reference.attention(q, seen_k, seen_v, rows, offsets, d**-0.5, window)
    assert np.abs(np.array(got) - expected).max() < 1e-5


@pytest.mark.parametrize("form", [(8, 64), (8, 32), (4, 32)])
@pytest.mark.parametrize("window", [0, 90])
def test_quantised_a_position_has_the_same_bits_decoded_or_in_any_chunk(
    isa: str, form: tuple[int, int], window: int
) -> None:
    (k, code), (v, _) = (kept(x, *form) for x in slabs(2, 2, 640, 64, 64))
    length = 600
    q = mx.random.normal((1, 6, length, 64), key=mx.random.key(3))

    def run(start: int, stop: int) -> np.ndarray:
        where = mx.array([1]), mx.array([start])
        part = q[:, :, start:stop]
        out = ops.attention(part, k, v, *where, 0.2, window, None, code, code)
        return np.array(out).view(np.uint32)

    whole = run(0, length)
    for start, stop in ((0, 7), (7, 64), (65, 330), (200, 300), (330, 600)):
        assert (run(start, stop) == whole[:, :, start:stop]).all(), (start, stop)
    for i in (0, 63, 64, 65, 255, 256, 257, 511, 512, 599):
        assert (run(i, i + 1) == whole[:, :, i : i + 1]).all(), i


@pytest.mark.parametrize("window", [0, 90])
@pytest.mark.parametrize("group,d", [(1, 64), (3, 64), (4, 128), (8, 32)])
def test_a_position_has_the_same_bits_decoded_or_in_any_chunk(
    isa: str, group: int, d: int, window: int
) -> None:
    k, v = slabs(2, 2, 640, d, d)
    length = 600
    q = mx.random.normal((1, 2 * group, length, d), key=mx.random.key(3))
    row = mx.array([1])

    def run(start: int, stop: int) -> np.ndarray:
        part = q[:, :, start:stop]
        out = ops.attention(part, k, v, row, mx.array([start]), 0.2, window)
        return np.array(out).view(np.uint32)

    whole = run(0, length)
    for start, stop in ((0, 7), (7, 64), (64, 65), (65, 330), (200, 300), (330, 600)):
        assert (run(start, stop) == whole[:, :, start:stop]).all(), (start, stop)
    for i in (0, 1, 63, 64, 65, 127, 128, 255, 256, 257, 300, 511, 512, 599):
        assert (run(i, i + 1) == whole[:, :, i : i + 1]).all(), i


@QUICK
@given(data=st.data())
def test_latents_match_the_reference(isa: str, data: st.DataObject) -> None:
    heads = data.draw(st.sampled_from((1, 3, 16, 70)))
    bits = data.draw(st.sampled_from((None, 8, 4)))
    d, rope = (32 * data.draw(st.integers(1, 4)) for _ in range(2))
    length = data.draw(st.sampled_from((1, 2, 5, 17)))
    offsets = data.draw(st.lists(st.integers(0, 400 - length), min_size=1, max_size=3))
    dtype = data.draw(st.sampled_from((mx.float32, mx.float16, mx.bfloat16)))
    latents, ropes = seen = slabs(4, 1, 400, d, rope, dtype)
    codes: list[ops.KVCode | None] = [None, None]
    if bits is not None:
        (latents, codes[0]), (ropes, codes[1]) = (kept(x, bits, 32) for x in seen)
        seen = read_back(seen[0], bits, 32), read_back(seen[1], bits, 32)
    rows = [3, 0, 2][: len(offsets)]
    q = mx.random.normal((len(offsets), length, heads, d + rope), key=mx.random.key(3))
    q = q.transpose(0, 2, 1, 3)
    where = mx.array(rows), mx.array(offsets)
    got = ops.latent_attention(q, latents, ropes, *where, (d + rope) ** -0.5, *codes)
    expected = reference.latent_attention(q, *seen, rows, offsets, (d + rope) ** -0.5)
    assert got.shape == (len(offsets), heads, length, d)
    assert np.abs(np.array(got) - expected).max() < 1e-5


def test_over_latents_a_position_has_the_same_bits_alone_or_in_any_chunk_and_batch(
    isa: str,
) -> None:
    latents, ropes = slabs(3, 1, 640, 64, 32)
    length = 600
    q = mx.random.normal((3, 12, length, 96), key=mx.random.key(3))

    def run(start: int, stop: int, rows: list[int]) -> np.ndarray:
        part = q[mx.array(rows), :, start:stop]
        where = mx.array(rows), mx.array([start] * len(rows))
        out = ops.latent_attention(part, latents, ropes, *where, 0.2)
        return np.array(out).view(np.uint32)

    whole = run(0, length, [1])
    for start, stop in ((0, 7), (7, 64), (65, 330), (330, 600)):
        assert (run(start, stop, [1]) == whole[:, :, start:stop]).all(), (start, stop)
    for i in (0, 63, 64, 65, 255, 256, 257, 511, 512, 599):
        assert (run(i, i + 1, [0, 1, 2])[1] == whole[0, :, i : i + 1]).all(), i


def test_a_row_does_not_depend_on_its_neighbours(isa: str) -> None:
    k, v = slabs(16, 3, 700, 64, 64)
    lengths = [0, 1, 63, 64, 65, 300, 699, 5, 17, 256, 255, 257, 600, 2, 3, 4]
    q = mx.random.normal((16, 9, 1, 64), key=mx.random.key(3))
    rows, offsets = mx.arange(16), mx.array(lengths)
    whole = np.array(ops.attention(q, k, v, rows, offsets, 0.125)).view(np.uint32)
    for i in range(16):
        one = slice(i, i + 1)
        alone = ops.attention(q[one], k, v, rows[one], offsets[one], 0.125)
        assert (np.array(alone).view(np.uint32)[0] == whole[i]).all(), i


def test_what_lies_beyond_a_row_is_not_read(isa: str) -> None:
    k, v = (
        np.random.default_rng(i).normal(size=(3, 2, 300, 32)).astype(np.float32) for i in (0, 1)
    )
    q = mx.random.normal((2, 4, 5, 32), key=mx.random.key(3))
    args = (mx.array([2, 0]), mx.array([100, 251]), 0.2)
    clean = np.array(ops.attention(q, mx.array(k), mx.array(v), *args))
    for a in (k, v):
        a[1] = np.nan
        a[2, :, 105:] = np.nan
        a[0, :, 256:] = np.inf
    dirty = np.array(ops.attention(q, mx.array(k), mx.array(v), *args))
    assert (clean == dirty).all()
    # A later position's NaN does not reach an earlier query of the same chunk.
    k[2, :, 103] = v[2, :, 103] = np.nan
    mixed = np.array(ops.attention(q, mx.array(k), mx.array(v), *args))
    assert (mixed[0, :, :3] == clean[0, :, :3]).all()
    assert np.isnan(mixed[0, :, 3:]).all()


@pytest.mark.parametrize("slab_type", [mx.float32, mx.bfloat16, mx.float16])
def test_kv_write(isa: str, slab_type: mx.Dtype) -> None:
    keys, values = slabs(4, 2, 50, 16, 32, slab_type)
    k = mx.random.normal((2, 3, 2, 16)).transpose(0, 2, 1, 3)
    v = mx.random.normal((2, 2, 3, 32))
    rows, offsets = [3, 1], [47, 0]
    expected = [
        reference.kv_write(keys, k.astype(slab_type), rows, offsets),
        reference.kv_write(values, v.astype(slab_type), rows, offsets),
    ]
    got = ops.kv_write(keys, values, k, v, mx.array(rows), mx.array(offsets))
    for a, b in zip(got, expected, strict=True):
        assert (np.array(a.astype(mx.float32)) == b).all()


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("form", [(8, 64), (8, 32), (4, 32)])
def test_kv_write_keeps_the_words_of_mlx(isa: str, form: tuple[int, int], dtype: mx.Dtype) -> None:
    keys, code = kept(slabs(4, 2, 50, 64, 64, dtype)[0], *form)
    # Ends of every sign, equal numbers, zeros, and what is far from zero or all alike.
    k = mx.random.normal((2, 9, 2, 64), key=mx.random.key(5)).transpose(0, 2, 1, 3)
    k = k * mx.array([1, 1e-9, 0, 1e4, 1, 1, 1e-3, 30, 1])[:, None]
    k = (k + mx.array([0, 0, 0, 0, 5, -5, 1, 0, -1e-4])[:, None]).astype(dtype)
    rows, offsets = [3, 1], [41, 0]
    want = np.array(keys)
    new = np.array(kept(k, *form)[0])
    for b in range(2):
        want[rows[b], :, offsets[b] : offsets[b] + 9] = new[b]
    where = mx.array(rows), mx.array(offsets)
    got, _ = ops.kv_write(keys, keys + 0, k, k, *where, code, code)
    assert (np.array(got) == want).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_group(isa: str, bad: float) -> None:
    x = np.random.default_rng(3).normal(size=(1, 1, 3, 64)).astype(np.float32)
    x[0, 0, 1, 40] = bad
    words, code = kept(mx.zeros((1, 1, 4, 64)), 8, 32)
    where = mx.array([0]), mx.array([0])
    words, _ = ops.kv_write(words, words + 0, mx.array(x), mx.array(x), *where, code, code)
    affine = words[..., 16:].view(mx.float32)
    read = np.array(mx.dequantize(words[..., :16], *mx.split(affine, 2, -1), 32, 8))[0, 0, :3]
    assert np.isnan(read[1, 32:]).all()
    assert np.isfinite(read[[0, 2]]).all() and np.isfinite(read[1, :32]).all()


def test_kv_write_is_in_place_and_bounded() -> None:
    keys, values = slabs(2, 1, 8, 16, 16)
    new = mx.ones((1, 1, 1, 16))
    before = mx.get_active_memory()
    for position in range(8):
        keys, values = ops.kv_write(keys, values, new, new, mx.array([1]), mx.array([position]))
        mx.eval(keys, values)
    assert mx.get_active_memory() - before < 2 * keys.nbytes
    assert (np.array(keys)[1] == 1).all()
    for row, position in ((1, 8), (2, 0), (-1, 0), (0, -1)):
        with pytest.raises(RuntimeError, match=r"out of range|capacity"):
            mx.eval(ops.kv_write(keys, values, new, new, mx.array([row]), mx.array([position])))
    mx.eval(mx.ones((2,)) + 1)


def test_wrong_shapes_are_refused() -> None:
    keys, values = slabs(2, 2, 8, 16, 16)
    q = mx.zeros((1, 3, 1, 16))
    with pytest.raises(ValueError, match="multiple of the KV heads"):
        ops.attention(q, keys, values, mx.array([0]), mx.array([0]), 1.0)
    words, (_, *code) = kept(mx.zeros((2, 2, 8, 32)), 8, 32)
    one = mx.array([0])
    wide = mx.zeros((1, 2, 1, 32))
    for bits, slab, message in ((4, words, "lines"), (5, words, "8 or 4"), (8, wide, "lines")):
        with pytest.raises(ValueError, match=message):
            ops.attention(wide, slab, slab, one, one, 1.0, 0, None, (bits, *code), (bits, *code))
    with pytest.raises(ValueError, match="expected float32"):
        ops.attention(wide, words, words, one, one, 1.0)
    with pytest.raises(ValueError, match="one offset"):
        ops.attention(q[:, :2], keys, values, mx.array([0]), mx.array([0, 1]), 1.0)
    with pytest.raises(ValueError, match="their keys' dim"):
        ops.latent_attention(q[:, :2], keys, values, mx.array([0]), mx.array([0]), 1.0)
