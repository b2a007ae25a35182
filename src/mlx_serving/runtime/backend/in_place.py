"""Attention that reads row slabs where they lie, for models that go layer by layer.

The views of `views` copy: a batch's write gathers, its read slices, its mask is an array. With the
native kernels a layer writes its slabs in place and hands attention a `RowMask` instead. Which
models can take one is not told by their class: it is tried, once, against the copying way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module

from mlx_serving.runtime.backend.kv import KVStore
from mlx_serving.runtime.backend.kv_layers import KVLayer, MakeKVLayer
from mlx_serving.runtime.backend.quantized_kv import (
    AS_COMPUTED,
    FORMATS,
    Code,
    KVFormat,
    Unquantizable,
    half,
)
from mlx_serving.runtime.backend.views import Rows
from mlx_serving.runtime.native import ops
from mlx_serving.runtime.native.slab import RowMask

TRIAL_PROMPTS = (7, 3)
TRIAL_TOLERANCE = 0.01
"""Of the largest logit. Sums in another order differ by 1e-5, a wrong mask or key by its own size."""

log = logging.getLogger(__name__)


class InPlaceLayer(KVLayer):
    """A `KVLayer` whose slabs the native kernels write and read."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        slabs = self.native_slabs(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype)
        indices = self.rows.view.indices
        self.native_store(*ops.kv_write(*slabs, keys, values, *indices, *self.codes))
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def make_mask(  # type: ignore[override]
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> RowMask:
        del return_array  # it never is one
        assert self.rows.view.count == N
        return RowMask(*self.rows.view.indices, window_size or self.window or 0)


class QuantizedInPlaceLayer(InPlaceLayer):
    """An `InPlaceLayer` whose slabs hold words or halves, which the kernels write and read as they are."""

    def __init__(self, rows: Rows, window: int | None = None, *, form: KVFormat) -> None:
        super().__init__(rows, window)
        self._form = form

    def native_slabs(
        self, kv_heads: int, key_dim: int, value_dim: int, dtype: mx.Dtype
    ) -> tuple[mx.array, mx.array]:
        if self._form == AS_COMPUTED:
            return super().native_slabs(kv_heads, key_dim, value_dim, dtype)
        if self._form == FORMATS["16"]:
            return super().native_slabs(kv_heads, key_dim, value_dim, half(dtype))
        assert self._form.key_bits and self._form.value_bits
        key = Code.of(self._form.key_bits, key_dim, dtype)
        value = Code.of(self._form.value_bits, value_dim, dtype)
        self.codes = key, value
        return super().native_slabs(kv_heads, key.words, value.words, mx.uint32)


def attends_in_place(
    model: Module,
    make: Callable[[MakeKVLayer], KVStore],
    plain_layer: MakeKVLayer = KVLayer,
    in_place_layer: MakeKVLayer = InPlaceLayer,
    quantized_layer: MakeKVLayer | None = None,
) -> bool:
    """Whether the model's logits are the same over stores of either kind of layer, which `make`
    gives: two prompts and a step of both. Models that compute with masks themselves, or with keys that
    they fetched, either raise or differ. A store of separate rows has no slabs to read. Layers that
    round are not compared; a model that hides them from its attention raises."""
    plain = make(plain_layer)
    if not plain.batched:
        return False
    want = _trial(model, plain)
    try:
        got = _trial(model, make(in_place_layer))
        if quantized_layer is not None:
            _trial(model, make(quantized_layer))
    except Unquantizable:
        raise
    except Exception as error:
        # A model file does to a mask what it likes.
        log.debug("attention does not read KV in place: %s: %s", type(error).__name__, error)
        return False
    worst, largest = mx.max(mx.abs(got - want)), mx.max(mx.abs(want))
    return bool(mx.all(worst <= TRIAL_TOLERANCE * largest).item())


def _trial(model: Module, store: KVStore) -> mx.array:
    """The last position's logits of every forward pass."""
    logits: list[mx.array] = []

    def forward(tokens: list[list[int]], caches: list[Any]) -> None:
        logits.append(model(mx.array(tokens), cache=caches)[:, -1].astype(mx.float32))
        mx.eval(logits)

    for row, length in enumerate(TRIAL_PROMPTS):
        store.start(row, length)
        forward([[1 + 3 * i % 7 for i in range(length)]], store.row_view(row, 0, length))
    rows = len(TRIAL_PROMPTS)
    forward([[5]] * rows, store.batch_view(dict(enumerate(TRIAL_PROMPTS)), rows))
    return mx.concatenate(logits)
