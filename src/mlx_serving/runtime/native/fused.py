"""The whole layer stack of the llama, qwen and gemma families as one operation.

A decode step of a small model is bound by the number of operations, not by their work: see
docs/adr/0010. The fused decoder runs when every layer's cache is a `SlabCache` that agrees;
otherwise the model's own forward runs, over layers that share the same packed weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx.nn.layers.embedding import Embedding
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.positional_encoding import RoPE
from mlx.nn.layers.quantized import QuantizedEmbedding, QuantizedLinear
from mlx_lm.models import gemma3_text, llama, qwen2, qwen3

from mlx_serving.runtime.native import _load, layers, ops
from mlx_serving.runtime.native.slab import SlabCache
from mlx_serving.runtime.slices import Slices

FAMILIES: dict[type, str] = {
    llama.LlamaModel: "llama",
    qwen2.Qwen2Model: "qwen2",
    qwen3.Qwen3Model: "qwen3",
    gemma3_text.Gemma3Model: "gemma3",
}

PackInto = Callable[..., None]


class Unfusable(Exception):
    """Why a model keeps its own forward."""


class FusedDecoder:
    """The native decoder of one model and what it needs of the caches."""

    def __init__(self, handle: Any, kv_heads: int, head_dim: int, dtype: mx.Dtype) -> None:
        self.handle = handle
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.dtype = dtype
        self.off = False
        """Go layer by layer: something is added inside the layers, which this does not see."""

    def __call__(self, x: mx.array, caches: Sequence[Any] | None) -> mx.array | None:
        """Hidden states `[batch, length, hidden]` float32 after the final norm, or None if the caches
        are of another kind or it is off. x: ids `[batch, length]` or embeddings `[batch, length, hidden]`."""
        if self.off or not caches or not isinstance(caches[0], SlabCache):
            return None
        view = caches[0].native_view()
        if view is None:
            return None
        slabs: list[mx.array] = []
        for cache in caches:
            slabs += cache.native_slabs(self.kv_heads, self.head_dim, self.head_dim, self.dtype)
        out = _load.require().decoder_forward(self.handle, x, *view, slabs, *caches[0].codes)
        for i, cache in enumerate(caches):
            cache.native_store(out[1 + 2 * i], out[2 + 2 * i])
        return out[0]


def fuse(
    model: Module,
    mode: ops.Mode,
    pack_into: PackInto,
    keep: set[str],
    kv_dtype: mx.Dtype | None = None,
) -> Slices[str]:
    """Give the model's inner stack a fused decoder, a layer a slice. Returns its family, or
    `not fused: ` and why."""
    inner = getattr(model, "model", None)
    family = FAMILIES.get(type(inner))
    if inner is None or family is None:
        return f"not fused: no fused layers for {type(model).__module__.rpartition('.')[2]}"
    if keep & {name.rpartition(".")[2] for name, _ in inner.named_modules()}:
        return "not fused: the model file reads its layers' weights"
    try:
        decoder = yield from _decoder(inner, family, mode, pack_into)
    except Unfusable as error:
        return f"not fused: {error}"
    decoder.dtype = kv_dtype or decoder.dtype
    object.__setattr__(inner, "_fused", decoder)
    inner.__class__ = _FUSED[type(inner)]
    return family


def decoder_of(model: Module) -> FusedDecoder | None:
    decoder: FusedDecoder | None = getattr(model, "model", model).__dict__.get("_fused")
    return decoder


def _forward(
    self: Any,
    inputs: mx.array,
    cache: Any = None,
    input_embeddings: mx.array | None = None,
) -> mx.array:
    hidden = self._fused(inputs if input_embeddings is None else input_embeddings, cache)
    if hidden is not None:
        return hidden
    return _own(type(self)).__call__(self, inputs, cache, input_embeddings)


def _own(cls: type) -> Any:
    """mlx-lm's class that a fused one stands in for."""
    return next(base for base in cls.__mro__ if base in FAMILIES)


_FUSED: dict[type, type] = {
    cls: type(f"Fused{cls.__name__}", (cls,), {"__module__": __name__, "__call__": _forward})
    for cls in FAMILIES
}


def _quantisation(module: Module) -> tuple[Any, ...]:
    if type(module) is QuantizedLinear:
        form = layers.quantisation(module)
        if form is None:
            raise Unfusable(f"{module.bits}-bit {module.mode} weights")
        return form
    if type(module) is Linear:
        return ("dense", module.weight.dtype)
    raise Unfusable(f"a projection is a {type(module).__name__}")


def _pack_together(modules: list[Module], pack_into: PackInto) -> tuple[Any, mx.array | None]:
    """One packed weight of several layers' outputs, each layer keeping a slice; and their bias."""
    if len({_quantisation(m) for m in modules}) != 1:
        raise Unfusable("q, k and v are quantised differently")
    outputs = [m.weight.shape[0] for m in modules]
    if any(n % 16 for n in outputs[:-1]):
        raise Unfusable("projections' widths are not multiples of 16")
    biases = [m.get("bias") for m in modules]
    if any(b is None for b in biases) and any(b is not None for b in biases):
        raise Unfusable("some projections have a bias, others not")
    first = modules[0]

    def joined(name: str) -> mx.array:
        return mx.concatenate([m[name] for m in modules])

    if isinstance(first, QuantizedLinear):
        biases_of = None if first.get("biases") is None else joined("biases")
        packed = ops.pack_quantized(
            joined("weight"), joined("scales"), biases_of, first.group_size, first.bits
        )
    else:
        packed = ops.pack_dense(joined("weight"))
    start = 0
    for module, n in zip(modules, outputs, strict=True):
        pack_into(module, packed if n == packed.n else packed.slice(start, start + n))
        start += n
    bias = None if biases[0] is None else mx.concatenate([b for b in biases if b is not None])
    return packed, bias


def _check(inner: Any, family: str) -> None:
    """Everything that can refuse, before the first layer gives its weights away."""
    for layer in inner.layers:
        attn, mlp = layer.self_attn, layer.mlp
        for module in (attn.o_proj, mlp.down_proj, mlp.gate_proj, mlp.up_proj):
            _quantisation(module)
        if len({_quantisation(m) for m in (attn.q_proj, attn.k_proj, attn.v_proj)}) != 1:
            raise Unfusable("q, k and v are quantised differently")
        if _quantisation(mlp.gate_proj) != _quantisation(mlp.up_proj):
            raise Unfusable("gate and up are quantised differently")
        if any("bias" in m for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)):
            raise Unfusable("the MLP has a bias")
        if len({("bias" in m) for m in (attn.q_proj, attn.k_proj, attn.v_proj)}) != 1:
            raise Unfusable("some projections have a bias, others not")
        if _head_dim(attn) % 16 or layers.rope_table(attn.rope) is None:
            raise Unfusable("head dim or rope of another kind")
    if family == "gemma3" and inner.args.sliding_window_pattern < 1:
        raise Unfusable("no sliding-window pattern")
    embed = inner.embed_tokens
    if type(embed) is QuantizedEmbedding:
        if layers.quantisation(embed) is None:
            raise Unfusable("embeddings of another kind")
    elif type(embed) is not Embedding:
        raise Unfusable(f"embeddings are a {type(embed).__name__}")


def _head_dim(attn: Any) -> int:
    return (
        int(attn.o_proj.scales.shape[-1] * attn.o_proj.group_size // attn.n_heads)
        if "scales" in attn.o_proj
        else int(attn.o_proj.weight.shape[-1] // attn.n_heads)
    )


def _decoder(inner: Any, family: str, mode: ops.Mode, pack_into: PackInto) -> Slices[FusedDecoder]:
    from mlx_serving.runtime.native.install import pack

    _check(inner, family)
    native = _load.require()
    gemma = family == "gemma3"
    first = inner.layers[0].self_attn
    heads, kv_heads, head_dim = first.n_heads, first.n_kv_heads, _head_dim(first)

    def weight(norm: Module) -> mx.array:
        w = norm.weight.astype(mx.float32)
        return 1.0 + w if gemma else w

    embed = inner.embed_tokens
    embedding = pack(embed)
    pack_into(embed, embedding)
    embed_scale = 1.0
    if gemma:
        # mlx-lm rounds the factor to bfloat16.
        embed_scale = float(
            np.array(mx.array(inner.args.hidden_size**0.5, mx.bfloat16).astype(mx.float32))
        )
    handle = native.decoder(
        heads,
        kv_heads,
        head_dim,
        float(inner.norm.eps),
        float(first.scale),
        embed_scale,
        "gelu_tanh" if gemma else "silu",
        mode,
        embedding,
        weight(inner.norm),
    )
    tables: dict[str, ops.RopeTable] = {}
    for layer in inner.layers:
        yield
        attn, mlp = layer.self_attn, layer.mlp
        qkv, qkv_bias = _pack_together([attn.q_proj, attn.k_proj, attn.v_proj], pack_into)
        single = {}
        for name, module in (
            ("o", attn.o_proj),
            ("gate", mlp.gate_proj),
            ("up", mlp.up_proj),
            ("down", mlp.down_proj),
        ):
            single[name], _ = _pack_together([module], pack_into)
        optional: dict[str, mx.array] = {}
        if family in ("qwen3", "gemma3"):
            optional["q_norm"], optional["k_norm"] = weight(attn.q_norm), weight(attn.k_norm)
        mlp_norm = layer.post_attention_layernorm
        if gemma:
            mlp_norm = layer.pre_feedforward_layernorm
            optional["post_attn_norm"] = weight(layer.post_attention_layernorm)
            optional["post_mlp_norm"] = weight(layer.post_feedforward_layernorm)
        key = _rope_key(attn.rope)
        if key not in tables:
            tables[key] = layers.rope_table(attn.rope)
        window = 0
        if gemma and attn.is_sliding:
            window = inner.window_size
        elif getattr(layer, "use_sliding", False):
            window = inner.sliding_window
        handle.add_layer(
            qkv=qkv,
            **single,
            in_norm=weight(layer.input_layernorm),
            mlp_norm=weight(mlp_norm),
            rope=tables[key],
            window=window,
            qkv_bias=qkv_bias,
            o_bias=attn.o_proj.get("bias"),
            **optional,
        )
    return FusedDecoder(handle, kv_heads, head_dim, embed._dtype)


def _rope_key(rope: Module) -> str:
    """Equal for layers whose tables are equal."""
    if isinstance(rope, RoPE):
        return f"{rope.dims} {rope.base} {rope.scale} {rope.traditional}"
    extra = (getattr(rope, "mscale", 1.0), getattr(rope, "_scale", 1.0))
    return f"{type(rope).__name__} {rope._freqs.tolist()} {extra}"
