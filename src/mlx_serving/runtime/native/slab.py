"""How a KV cache hands its slabs to the kernels.

Two ways, both decided by the cache object, so that model files run unmodified:

- `make_mask` returns a `RowMask`, and `update_and_fetch` returns whole slabs (from `ops.kv_write`).
  The attention that `accelerate` binds into a model's attention classes sees the mask and reads the
  slabs in place; any other mask goes to mlx-lm's own function.
- A cache that is a `SlabCache` also serves the fused decoder, which replaces the whole layer stack.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import mlx.core as mx
from mlx_lm.models import base

from mlx_serving.runtime.native import ops


@dataclass(frozen=True, eq=False)
class RowMask:
    """Causal attention over slab rows, in place of a mask array."""

    rows: mx.array
    """int32 `[batch]`: the slab row of each batch row."""
    offsets: mx.array
    """int32 `[batch]`: positions each row held before this forward pass."""
    window: int = 0
    """Keys that a query sees, itself included; 0 for all."""


Codes = tuple[ops.KVCode | None, ops.KVCode | None]
"""How slabs of keys and of values keep a vector; None: its numbers as they are."""

PLAIN: Codes = (None, None)


@runtime_checkable
class SlabCache(Protocol):
    """One layer's cache, as the fused decoder takes it."""

    codes: Codes
    """Known once the slabs were handed over; the same for all layers."""

    def native_view(self) -> tuple[mx.array, mx.array] | None:
        """Rows and offsets of this forward pass (as in `RowMask`), the same arrays for all layers;
        None to refuse."""
        ...

    def native_slabs(
        self, kv_heads: int, key_dim: int, value_dim: int, dtype: mx.Dtype
    ) -> tuple[mx.array, mx.array]:
        """The slabs `[slots, kv_heads, capacity, dim]` (words, if quantised), allocated and large enough.
        They are handed over: the decoder writes into their memory, and nothing may use these arrays
        afterwards."""
        ...

    def native_store(self, keys: mx.array, values: mx.array) -> None:
        """Takes the slabs back, written."""
        ...


def scaled_dot_product_attention(
    queries: mx.array,
    keys: Any,
    values: Any,
    cache: Any,
    scale: float,
    mask: Any,
    sinks: mx.array | None = None,
) -> mx.array:
    """mlx-lm's function of that name, with `RowMask` understood."""
    if isinstance(mask, RowMask):
        codes = getattr(cache, "codes", PLAIN)
        where = mask.rows, mask.offsets
        return ops.attention(queries, keys, values, *where, scale, mask.window, sinks, *codes)
    return base.scaled_dot_product_attention(
        queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks
    )
