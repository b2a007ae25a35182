"""Quantised rows by themselves: what attention sees is what an obvious oracle sees, whatever was done."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache

from mlx_serving.runtime import native
from mlx_serving.runtime.backend.kv import RowSlots
from mlx_serving.runtime.backend.kv_layers import MakeKVLayer
from mlx_serving.runtime.backend.prefix import PrefixPlan
from mlx_serving.runtime.backend.quantized_kv import (
    FORMATS,
    Code,
    KVFormat,
    QuantizedLayer,
    Unquantizable,
    check,
    refusal,
)
from mlx_serving.runtime.backend.separate_rows import SeparateRows
from mlx_serving.runtime.backend.tier import open_folder
from mlx_serving.runtime.native import slab
from mlx_serving.types import KVBits
from mlx_serving.worker.wire import ModelOptions

HEADS, DIM, ROWS, BLOCK, SCALE = 2, 32, 3, 4, 0.2
BITS: list[KVBits] = ["16", "8", "4", "k8v4"]


class Described:
    """A model as far as a store looks at it."""

    def __init__(self, *caches: Any) -> None:
        self._caches = caches

    def make_cache(self) -> list[Any]:
        return list(self._caches)


def quantised_alone(vector: np.ndarray, bits: int) -> np.ndarray:
    """One head's vector, quantised by itself and read back by hand."""
    if bits == 16:
        return np.array(mx.array(vector).astype(mx.bfloat16).astype(mx.float32))
    words, scales, biases = (np.array(a) for a in mx.quantize(mx.array(vector[None]), 32, bits))
    each = 32 // bits
    numbers = [(int(word) >> (bits * i)) & (2**bits - 1) for word in words[0] for i in range(each)]
    return np.array(numbers, np.float32) * scales[0, 0] + biases[0, 0]


class Oracle:
    """Every row's keys and values as quantised vectors, in lists."""

    def __init__(self, form: KVFormat, window: int | None) -> None:
        self.form, self.window = form, window
        self.rows: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in range(ROWS)]

    def write(self, row: int, keys: np.ndarray, values: np.ndarray) -> None:
        """`[heads, count, dim]` each."""
        for at in range(keys.shape[1]):
            key = np.stack([quantised_alone(k[at], self.form.key_bits) for k in keys])
            value = np.stack([quantised_alone(v[at], self.form.value_bits) for v in values])
            self.rows[row].append((key, value))

    def attend(self, row: int, query: np.ndarray, position: int) -> np.ndarray:
        """`[heads, dim]` for the query at `position`."""
        first = 0 if self.window is None else max(0, position + 1 - self.window)
        seen = self.rows[row][first : position + 1]
        out = []
        for head in range(HEADS):
            keys = np.stack([key[head] for key, _ in seen]).astype(np.float64)
            values = np.stack([value[head] for _, value in seen]).astype(np.float64)
            scores = keys @ query[head] * SCALE
            weights = np.exp(scores - scores.max())
            out.append(weights / weights.sum() @ values)
        return np.stack(out)


class Kept:
    """A store, its oracle, and the numbers that both are given."""

    def __init__(self, bits: KVBits, window: int | None, layer: Any, seed: int) -> None:
        form = FORMATS[bits]
        assert form is not None
        cache = KVCache() if window is None else RotatingKVCache(window)
        model: Any = Described(cache)
        attention: MakeKVLayer = partial(layer, form=form)
        self.store = RowSlots(model, ROWS, bucket=8, attention=attention)
        self.store.open_pool(8, BLOCK)
        self.oracle = Oracle(form, window)
        self._rng = np.random.default_rng(seed)
        for row in range(ROWS):
            self.store.start(row, 1)

    def _forward(self, caches: list[Any], positions: dict[int, int], batch: int, n: int) -> None:
        """`positions`: of each row that counts, in the order of the batch's lines."""
        (cache,) = caches
        q, k, v = self._rng.normal(size=(3, batch, HEADS, n, DIM)).astype(np.float32)
        mask = cache.make_mask(n, return_array=True, window_size=self.oracle.window)
        keys, values = cache.update_and_fetch(mx.array(k), mx.array(v))
        attend = slab.scaled_dot_product_attention
        if not isinstance(mask, slab.RowMask):
            attend = scaled_dot_product_attention
        got = np.array(attend(mx.array(q), keys, values, cache, SCALE, mask))
        for row, start in positions.items():
            line = 0 if batch == 1 else row
            self.oracle.write(row, k[line], v[line])
            for i in range(n):
                want = self.oracle.attend(row, q[line, :, i], start + i)
                np.testing.assert_allclose(got[line, :, i], want, atol=2e-5)

    def prefill(self, row: int, count: int) -> None:
        start = self.store.length(row)
        self._forward(self.store.row_view(row, start, count), {row: start}, 1, count)

    def decode(self, active: list[int]) -> None:
        rows = max(active) + 1
        positions = {row: self.store.length(row) for row in active}
        self._forward(self.store.batch_view(positions, rows), positions, rows, 1)

    def roll_back(self, row: int, length: int) -> None:
        self.store.truncate(row, min(length, self.store.length(row)))
        del self.oracle.rows[row][length:]

    def move(self, source: int, target: int) -> None:
        if source != target:
            self.store.move(source, target)
            self.store.start(source, 1)
            self.oracle.rows[target], self.oracle.rows[source] = self.oracle.rows[source], []

    def reuse(self, source: int, target: int) -> None:
        """`target` begins anew with what blocks of `source` hold, which went to disk and back."""
        count = self.store.length(source) // BLOCK
        if source == target or not count:
            return
        blocks = list(range(count))[:4]
        self.store.publish(source, 0, blocks)
        layout, data = self.store.copy_out(blocks)
        mx.eval(data)
        self.store.fill_blocks(blocks, layout, data)
        self.store.truncate(target, 0)
        self.store.start(target, len(blocks) * BLOCK)
        self.store.copy_blocks(target, blocks)
        self.oracle.rows[target] = self.oracle.rows[source][: len(blocks) * BLOCK]


ROW = st.integers(0, ROWS - 1)
ACTIONS = st.one_of(
    st.tuples(st.just("prefill"), ROW, st.integers(1, 9)),
    st.tuples(st.just("decode"), st.lists(ROW, min_size=1, max_size=ROWS, unique=True)),
    st.tuples(st.just("roll_back"), ROW, st.integers(0, 20)),
    st.tuples(st.just("move"), ROW, ROW),
    st.tuples(st.just("reuse"), ROW, ROW),
)


def _layers() -> list[Any]:
    if not native.available():
        return [QuantizedLayer]
    from mlx_serving.runtime.backend.in_place import QuantizedInPlaceLayer

    return [QuantizedLayer, QuantizedInPlaceLayer]


@pytest.mark.parametrize("layer", _layers())
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("bits", BITS)
def test_attention_sees_what_the_oracle_sees(bits: KVBits, window: int | None, layer: Any) -> None:
    @settings(max_examples=8, deadline=None)
    @given(st.lists(ACTIONS, min_size=3, max_size=8), st.integers(0, 99))
    def holds(actions: list[Any], seed: int) -> None:
        kept = Kept(bits, window, layer, seed)
        kept.prefill(0, 9)  # something to reuse, roll back and move
        for name, *arguments in actions:
            getattr(kept, name)(*arguments)
        kept.decode(list(range(ROWS)))

    holds()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("dim", [32, 64, 96, 128])
def test_words_are_what_mlx_quantises(bits: int, dtype: mx.Dtype, dim: int) -> None:
    x = mx.random.normal((2, 3, 5, dim), key=mx.random.key(dim)).astype(dtype)
    code = Code.of(bits, dim, dtype)
    words = code.encode(x)
    assert words.dtype == mx.uint32 and words.nbytes < x.nbytes
    assert words.shape[-1] == code.words
    want = mx.dequantize(*mx.quantize(x, code.group, bits), code.group, bits)
    assert mx.array_equal(code.decode(words), want)
    part = code.encode(x[1:, :, 2:4])
    assert mx.array_equal(part, words[1:, :, 2:4]), "a vector's words are its own"


def test_heads_without_whole_groups_are_refused() -> None:
    with pytest.raises(Unquantizable, match="heads of 80 numbers"):
        Code.of(8, 80, mx.float32)


def test_what_has_no_quantised_form_says_why() -> None:
    assert "latent" in (refusal({"kv_lora_rank": 512}) or "")
    assert "latent" in (refusal({"text_config": {"kv_lora_rank": 512}}) or "")
    assert refusal({"kv_lora_rank": None, "text_config": None}) is None
    recurrent: Any = Described(ArraysCache(2))
    mixed: Any = Described(ArraysCache(2), KVCache())
    assert "no attention" in (check(RowSlots(recurrent, 1)) or "")
    assert check(RowSlots(mixed, 1)) is None
    assert "rows can share" in (check(SeparateRows(mixed, 1)) or "")


def test_blocks_on_disk_are_of_one_form(tmp_path: Path) -> None:
    plan = PrefixPlan("blocks", "", blocks=1)
    folders = set()
    for bits in FORMATS:
        options = ModelOptions(kv_disk_path=str(tmp_path), kv_disk_bytes=1 << 20, kv_bits=bits)
        folder = open_folder(tmp_path, {}, options, plan, 16, "exact", "float32")
        assert folder is not None
        folders.add(folder.folder)
    assert len(folders) == len(FORMATS) == 5
