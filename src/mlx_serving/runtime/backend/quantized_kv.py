"""Keys and values kept in 16, 8 or 4 bits.

16 are bfloat16's, where the model computes in more. Of 8 and 4, each position's vector is
quantised by itself when it is written (MLX's affine groups along the head), and attention always
reads what was kept, a prompt's own chunk included: what a position holds does not depend on where
its prompt was cut or on who else is in the batch. A slab's line is the quantised numbers, then
scales and biases, as 32-bit words, so that rows are moved, cut into blocks and put on disk like
any other. The native kernels read words (`in_place.QuantizedInPlaceLayer`). Where they do not
run, one layer's keys and values are dequantised at a time, for the rows and lengths that a
forward pass sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_serving.errors import ModelBroken
from mlx_serving.runtime.backend.kv import KVStore, RowSlots
from mlx_serving.runtime.backend.kv_layers import KVLayer
from mlx_serving.runtime.backend.views import Rows
from mlx_serving.types import KVBits

GROUPS = {8: (64, 32), 4: (32,)}
"""By bits: how many numbers share a scale, the first that divides a head. In 4 bits, twice as many cost
twice the divergence (benchmarks/APART.md)."""


class Unquantizable(ModelBroken):
    """`kv_bits` asks for what this model cannot do."""

    def __init__(self, why: str) -> None:
        super().__init__(f"kv_bits: KV cannot be quantised: {why} (off leaves it as it is)")
        self.why = why


@dataclass(frozen=True, slots=True)
class KVFormat:
    """None: as computed."""

    key_bits: int | None
    value_bits: int | None


FORMATS: dict[KVBits, KVFormat | None] = {
    "off": None,
    "16": KVFormat(16, 16),
    "8": KVFormat(8, 8),
    "4": KVFormat(4, 4),
    "k8v4": KVFormat(8, 4),
}
"""None: the model's own layers keep them."""


def refusal(config: dict[str, Any]) -> str | None:
    """Why a model's KV stays as it is, as far as its config tells."""
    text = config.get("text_config") or {}
    if config.get("kv_lora_rank") or text.get("kv_lora_rank"):
        return "its attention keeps a compressed latent, which all heads share"
    return None


def check(store: KVStore) -> str | None:
    """Why nothing in the store is quantised."""
    if not isinstance(store, RowSlots):
        return "its caches have no form that rows can share"
    if not any(isinstance(layer, KVLayer) for layer in store.layers):
        return "it has no attention layers"
    return None


AS_COMPUTED = KVFormat(None, None)
"""Loses nothing: to try how attention reads what these layers fetch."""


class Plain:
    """Keeps vectors as they are."""

    def encode(self, vectors: mx.array) -> mx.array:
        return vectors

    def decode(self, kept: mx.array) -> mx.array:
        return kept


def half(dtype: mx.Dtype) -> mx.Dtype:
    """What 16 bits are for numbers of this type."""
    return dtype if dtype.size == 2 else mx.bfloat16


@dataclass(frozen=True, slots=True)
class Half:
    """Keeps the first half of a float32's bits, rounded."""

    dtype: mx.Dtype

    def encode(self, vectors: mx.array) -> mx.array:
        return vectors.astype(half(self.dtype))

    def decode(self, kept: mx.array) -> mx.array:
        return kept.astype(self.dtype)


class Code(NamedTuple):
    """How one vector of `dim` numbers becomes words, and back. The native kernels take it as it is
    (`native.ops.KVCode`) and write the same words."""

    bits: int
    group: int
    dim: int
    dtype: mx.Dtype

    @classmethod
    def of(cls, bits: int, dim: int, dtype: mx.Dtype) -> Code:
        """Raises Unquantizable where no group fits."""
        group = next((size for size in GROUPS[bits] if dim % size == 0), None)
        if group is None:
            raise Unquantizable(f"heads of {dim} numbers have no whole groups of 32")
        return cls(bits, group, dim, dtype)

    @property
    def words(self) -> int:
        return (self.dim * self.bits + 2 * (self.dim // self.group) * 8 * self.dtype.size) // 32

    def encode(self, vectors: mx.array) -> mx.array:
        """`[…, dim]` as uint32 `[…, words]`."""
        numbers, *affine = mx.quantize(vectors, self.group, self.bits)
        return mx.concatenate([numbers, mx.concatenate(affine, -1).view(mx.uint32)], -1)

    def decode(self, words: mx.array) -> mx.array:
        """What attention reads."""
        width = self.dim * self.bits // 32
        affine = words[..., width:].view(self.dtype)
        scales, biases = mx.split(affine, 2, -1)
        return mx.dequantize(words[..., :width], scales, biases, self.group, self.bits)


def _code(bits: int | None, vectors: mx.array) -> Plain | Half | Code:
    if bits is None:
        return Plain()
    if bits == 16:
        return Half(vectors.dtype)
    return Code.of(bits, vectors.shape[-1], vectors.dtype)


class QuantizedLayer(KVLayer):
    """A `KVLayer` whose slabs hold words."""

    def __init__(self, rows: Rows, window: int | None = None, *, form: KVFormat) -> None:
        super().__init__(rows, window)
        self._form = form
        self._codes: tuple[Plain | Half | Code, Plain | Half | Code] | None = None
        self._plain_bytes = 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if self._codes is None:
            form = self._form
            self._codes = _code(form.key_bits, keys), _code(form.value_bits, values)
            self._plain_bytes = sum(x[:1, :, :1].nbytes for x in (keys, values))
        key_code, value_code = self._codes
        return super().update_and_fetch(key_code.encode(keys), value_code.encode(values))

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        assert self._codes is not None
        keys, values = self.words()
        return self._codes[0].decode(keys), self._codes[1].decode(values)

    def words(self) -> tuple[mx.array, mx.array]:
        return super().keys_and_values()

    def scratch_bytes_per_token(self) -> int:
        return self._plain_bytes

    def native_view(self) -> None:
        """The fused decoder reads words only of layers that say how they are kept."""
        return
