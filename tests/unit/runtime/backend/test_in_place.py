"""Whether attention can read slabs where they lie is tried: what the trial lets through and what not."""

from __future__ import annotations

from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import KVCache, RotatingKVCache

from mlx_serving.runtime import native
from mlx_serving.runtime.backend.in_place import (
    InPlaceLayer,
    QuantizedInPlaceLayer,
    attends_in_place,
)
from mlx_serving.runtime.backend.kv import RowSlots
from mlx_serving.runtime.backend.kv_layers import KVLayer
from mlx_serving.runtime.backend.quantized_kv import AS_COMPUTED, KVFormat
from mlx_serving.runtime.backend.separate_rows import SeparateRows
from mlx_serving.runtime.native.slab import RowMask, scaled_dot_product_attention

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why())


class Attention(nn.Module):
    """One head over the tokens' own embeddings; `spoil` is what a model file may do before it attends."""

    def __init__(self, spoil: str = "", window: int = 0, dim: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, dim)
        self.embed.weight = mx.random.normal((64, dim), key=mx.random.key(1))
        self._spoil, self._window = spoil, window

    def make_cache(self) -> list[Any]:
        return [RotatingKVCache(self._window) if self._window else KVCache()]

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        x = self.embed(tokens)[:, None]
        mask = cache[0].make_mask(tokens.shape[1], return_array=True)
        keys, values = cache[0].update_and_fetch(x, x)
        if self._spoil == "drops the mask":
            mask = None
        elif self._spoil == "computes with the mask" and mask is not None:
            mask = mask & True
        elif self._spoil == "shifts the keys":
            keys = mx.concatenate([keys[:, :, 1:], keys[:, :, :1]], axis=2)
        if self._spoil == "hides the cache":
            return scaled_dot_product_attention(x, keys, values, None, 0.1, mask)[:, 0]
        return scaled_dot_product_attention(x, keys, values, cache[0], 0.1, mask)[:, 0]


def _stores(model: nn.Module) -> Any:
    return lambda attention: RowSlots(model, 2, bucket=16, attention=attention)


@pytest.mark.parametrize("window", [0, 4])
def test_a_plain_model_attends_in_place(window: int) -> None:
    model = Attention(window=window)
    assert attends_in_place(model, _stores(model))


@pytest.mark.parametrize("spoil", ["drops the mask", "computes with the mask", "shifts the keys"])
def test_a_model_that_handles_masks_or_keys_does_not(spoil: str) -> None:
    model = Attention(spoil)
    assert not attends_in_place(model, _stores(model))


@pytest.mark.parametrize("spoil", ["", "hides the cache"])
def test_a_quantised_cache_must_reach_the_attention(spoil: str) -> None:
    model = Attention(spoil, dim=32)
    as_computed = partial(QuantizedInPlaceLayer, form=AS_COMPUTED)
    quantised = partial(QuantizedInPlaceLayer, form=KVFormat(8, 4))
    seen = attends_in_place(model, _stores(model), KVLayer, as_computed, quantised)
    assert seen == (not spoil)
    assert attends_in_place(model, _stores(model), KVLayer, as_computed)


def test_separate_rows_have_nothing_in_place() -> None:
    model = Attention()
    assert not attends_in_place(model, lambda _: SeparateRows(model, 2))


def test_a_layer_gives_its_slabs_and_a_row_mask() -> None:
    model = Attention(window=5)
    store = RowSlots(model, 2, bucket=16, attention=InPlaceLayer)
    store.start(0, 3)
    (cache,) = store.row_view(0, 0, 3)
    mask = cache.make_mask(3)
    assert isinstance(mask, RowMask) and mask.window == 5
    assert cache.make_mask(3, window_size=2).window == 2
    new = mx.arange(48, dtype=mx.float32).reshape(1, 1, 3, 16)
    keys, values = cache.update_and_fetch(new, -new)
    assert keys is cache.keys and values is cache.values
    assert keys.shape == (1, 1, 16, 16)
    assert mx.array_equal(keys[:, :, :3], new) and mx.array_equal(values[:, :, :3], -new)
    assert isinstance(cache, KVLayer)
