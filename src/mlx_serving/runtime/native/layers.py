"""Subclasses of MLX's layers that call the kernels; instances are moved to them by `accelerate`.

They stay subclasses of what they replace, so `isinstance` checks in model files hold.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx.nn.layers.embedding import Embedding
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.normalization import RMSNorm
from mlx.nn.layers.positional_encoding import RoPE
from mlx.nn.layers.quantized import QuantizedEmbedding, QuantizedLinear
from mlx_lm.models import rope_utils
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlx_serving.runtime.native import ops


def _linear(self: Any, x: mx.array) -> mx.array:
    return ops.linear(x, self._packed, self.get("bias"), self._mode)


GROUPS = (32, 64, 128)
BITS = (2, 3, 4, 5, 6, 8)
FLOATS = (("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32))
"""Formats without biases: mode, bits, group size."""


def quantisation(module: Any) -> tuple[str, int, int] | None:
    """(mode, bits, group size) of a quantised layer, or None for a form that no kernel takes."""
    form: tuple[str, int, int] = (module.mode, module.bits, module.group_size)
    if module.get("global_scale") is not None:
        return None
    if module.mode == "affine" and module.get("biases") is not None:
        return form if module.bits in BITS and module.group_size in GROUPS else None
    return form if form in FLOATS else None


class NativeQuantizedLinear(QuantizedLinear):
    __call__ = _linear


class NativeLinear(Linear):
    __call__ = _linear


class NativeEmbedding(Embedding):
    def __call__(self, x: mx.array) -> mx.array:
        return ops.embed(x, self._packed, self._dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        return ops.linear(x, self._packed, None, self._mode)


class NativeQuantizedEmbedding(QuantizedEmbedding):
    def __call__(self, x: mx.array) -> mx.array:
        return ops.embed(x, self._packed, self._dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        return ops.linear(x, self._packed, None, self._mode)


def _switch(self: Any, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
    """As gather_mm has it: x `[…, M, k]` and indices broadcast against each other. Their order does not
    matter here."""
    del sorted_indices
    *_, m, k = x.shape
    lead = np.broadcast_shapes(x.shape[:-2], indices.shape)
    rows = mx.broadcast_to(x, (*lead, m, k))
    experts = mx.broadcast_to(indices[..., None], (*lead, m))
    out = ops.gather_linear(rows, experts, self._packed, self._outputs, self._mode)
    return out + mx.expand_dims(self["bias"][indices], -2) if "bias" in self else out


class NativeSwitchLinear(SwitchLinear):
    __call__ = _switch


class NativeQuantizedSwitchLinear(QuantizedSwitchLinear):
    __call__ = _switch


def _multi(self: Any, x: mx.array, transpose: bool = True) -> mx.array:
    """A weight a head: x `[…, heads or 1, length, k]` to `[…, heads, length, n]`. Packed both ways, since
    latent attention absorbs a projection into its queries or its keys."""
    packed, n = self._packed, self._outputs
    if not transpose:
        packed, n = self._packed_back, self._inputs
    *lead, heads, length, _ = x.shape
    if heads == 1:
        out = ops.linear(x, packed, None, self._mode).reshape(*lead, length, packed.n // n, n)
        return out.swapaxes(-3, -2)
    experts = mx.broadcast_to(mx.arange(heads, dtype=mx.int32)[:, None], x.shape[:-1])
    return ops.gather_linear(x, experts, packed, n, self._mode)


class NativeMultiLinear(MultiLinear):
    __call__ = _multi


class NativeQuantizedMultiLinear(QuantizedMultiLinear):
    __call__ = _multi


class NativeRMSNorm(RMSNorm):
    def __call__(self, x: mx.array) -> mx.array:
        return ops.rms_norm(x, self._native_weight, self.eps)


class _NativeRope:
    """First of the bases, so that its call comes before the layer's own."""

    _table: ops.RopeTable

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        if x.ndim < 3:
            return super().__call__(x, offset=offset)  # type: ignore[misc]
        return ops.rope(x, offset, self._table)


ROPES = (
    RoPE,
    rope_utils.Llama3RoPE,
    rope_utils.YarnRoPE,
    rope_utils.SuScaledRoPE,
    rope_utils.ProportionalRoPE,
)

NATIVE_ROPES: dict[type, type] = {
    cls: type(f"Native{cls.__name__}", (_NativeRope, cls), {"__module__": __name__})
    for cls in ROPES
}


def rope_table(module: Module) -> ops.RopeTable | None:
    """The table of a rope layer, or None for a kind that has none (dynamic NTK, custom classes)."""
    if type(module) not in ROPES and type(module) not in NATIVE_ROPES.values():
        return None
    if isinstance(module, RoPE):
        dims, scale = module.dims, module.scale
        inv = [scale * math.pow(module.base, -2.0 * i / dims) for i in range(dims // 2)]
        return ops.rope_table(inv, module.traditional)
    freqs = [1.0 / float(f) for f in module._freqs.tolist()]
    magnitude = float(getattr(module, "mscale", getattr(module, "_scale", 1.0)))
    traditional = bool(getattr(module, "traditional", False))
    return ops.rope_table(freqs, traditional, magnitude)
