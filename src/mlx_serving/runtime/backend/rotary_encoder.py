"""Encoders whose positions are rotations: ModernBERT and nomic-bert, computed as `encoder` says.

ModernBERT normalises before each part, and most of its layers see a window only; nomic-bert
normalises after it, as BERT does. Both multiply an activated half of the inner states by the other.
Weights have Hugging Face's names.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import mlx.core as mx
import msgspec
from mlx.nn.layers.activations import silu
from mlx.nn.layers.base import Module
from mlx.nn.layers.embedding import Embedding
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.normalization import LayerNorm

from mlx_serving.runtime.backend.encoder import (
    ACTIVATIONS,
    Activate,
    Attend,
    Batch,
    TextEncoder,
)


class RotaryAttention(Module):
    """`window`: how far a token sees to either side; None: all."""

    def __init__(
        self, size: int, heads: int, base: float, window: int | None, *, bias: bool
    ) -> None:
        super().__init__()
        self.heads = heads
        self.base = base
        self.window = window
        self.Wqkv = Linear(size, 3 * size, bias=bias)
        self.Wo = Linear(size, size, bias=bias)

    def __call__(self, x: mx.array, batch: Batch, attend: Attend) -> mx.array:
        size = x.shape[-1]
        dim = size // self.heads
        mixed = []
        for part in batch.split(self.Wqkv(x)):
            texts, length, _ = part.shape
            qkv = part.reshape(texts, length, 3, self.heads, dim).transpose(2, 0, 3, 1, 4)
            q, k = (self._turned(qkv[i], dim) for i in range(2))
            out = self._attend(q, k, qkv[2], attend)
            mixed.append(out.transpose(0, 2, 1, 3).reshape(-1, size))
        return self.Wo(mx.concatenate(mixed))

    def _turned(self, x: mx.array, dim: int) -> mx.array:
        return mx.fast.rope(x, dim, traditional=False, base=self.base, scale=1.0, offset=0)

    def _attend(self, q: mx.array, k: mx.array, v: mx.array, attend: Attend) -> mx.array:
        scale, length = 1 / math.sqrt(q.shape[-1]), q.shape[-2]
        if self.window is None or length <= self.window + 1:
            return attend(q, k, v, scale)
        at = mx.arange(length)
        near = mx.abs(at[:, None] - at[None]) <= self.window
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=near)


# ------------------------------------------------------------------- ModernBERT


class ModernBertConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of config.json that the arithmetic depends on."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    norm_eps: float = 1e-5
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    hidden_act: str = msgspec.field(name="hidden_activation", default="gelu")
    global_attn_every_n_layers: int = 3
    local_attention: int = 128
    """Tokens that a layer with a window sees, half of them to either side."""
    global_rope_theta: float = 160_000.0
    local_rope_theta: float | None = 10_000.0
    layer_types: list[str] | None = None
    rope_parameters: dict[str, Any] | None = None
    """Both as later versions of transformers write them, by kind of layer."""
    classifier_pooling: Literal["cls", "mean"] = "cls"
    classifier_bias: bool = False
    classifier_activation: str = "gelu"

    @property
    def max_tokens(self) -> int:
        return self.max_position_embeddings

    def sees_all(self, layer: int) -> bool:
        if self.layer_types is not None:
            return self.layer_types[layer] == "full_attention"
        return layer % self.global_attn_every_n_layers == 0

    def base(self, layer: int) -> float:
        everything = self.sees_all(layer)
        if self.rope_parameters is not None:
            kind = "full_attention" if everything else "sliding_attention"
            return float(self.rope_parameters[kind]["rope_theta"])
        local = self.local_rope_theta
        return self.global_rope_theta if everything or local is None else local

    def unknown(self) -> str | None:
        """What it asks for and is not known here."""
        for name in (self.hidden_act, self.classifier_activation):
            if name not in ACTIVATIONS:
                return f"the activation {name!r}"
        for kind in (self.rope_parameters or {}).values():
            if isinstance(kind, dict) and kind.get("rope_type", "default") != "default":
                return f"rotations of the type {kind['rope_type']!r}"
        return None


class _ModernEmbeddings(Module):
    def __init__(self, c: ModernBertConfig) -> None:
        super().__init__()
        self.tok_embeddings = Embedding(c.vocab_size, c.hidden_size)
        self.norm = LayerNorm(c.hidden_size, eps=c.norm_eps, bias=c.norm_bias)


class _ModernMLP(Module):
    def __init__(self, c: ModernBertConfig) -> None:
        super().__init__()
        self.Wi = Linear(c.hidden_size, 2 * c.intermediate_size, bias=c.mlp_bias)
        self.Wo = Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def __call__(self, x: mx.array, act: Activate) -> mx.array:
        activated, factor = mx.split(self.Wi(x), 2, axis=-1)
        return self.Wo(act(activated) * factor)


class _ModernLayer(Module):
    def __init__(self, c: ModernBertConfig, index: int) -> None:
        super().__init__()
        size, heads = c.hidden_size, c.num_attention_heads
        window = None if c.sees_all(index) else c.local_attention // 2
        first = index == 0  # the embeddings are normalised already
        self.attn_norm = None if first else LayerNorm(size, eps=c.norm_eps, bias=c.norm_bias)
        self.attn = RotaryAttention(size, heads, c.base(index), window, bias=c.attention_bias)
        self.mlp_norm = LayerNorm(size, eps=c.norm_eps, bias=c.norm_bias)
        self.mlp = _ModernMLP(c)

    def __call__(self, x: mx.array, batch: Batch, attend: Attend, act: Activate) -> mx.array:
        normed = x if self.attn_norm is None else self.attn_norm(x)
        x = x + self.attn(normed, batch, attend)
        return x + self.mlp(self.mlp_norm(x), act)


class _ModernHead(Module):
    """`ModernBertForSequenceClassification`'s."""

    def __init__(self, c: ModernBertConfig, labels: int) -> None:
        super().__init__()
        self._mean = c.classifier_pooling == "mean"
        self._act = ACTIVATIONS[c.classifier_activation]
        self.dense = Linear(c.hidden_size, c.hidden_size, bias=c.classifier_bias)
        self.norm = LayerNorm(c.hidden_size, eps=c.norm_eps, bias=c.norm_bias)
        self.out = Linear(c.hidden_size, labels)

    def __call__(self, hidden: mx.array) -> mx.array:
        pooled = hidden.mean(1) if self._mean else hidden[:, 0]
        return self.out(self.norm(self._act(self.dense(pooled))))


class ModernBert(TextEncoder):
    def __init__(self, config: ModernBertConfig, labels: int = 0) -> None:
        head = _ModernHead(config, labels) if labels else None
        super().__init__(head, ACTIVATIONS[config.hidden_act])
        self.embeddings = _ModernEmbeddings(config)
        self.layers = [_ModernLayer(config, i) for i in range(config.num_hidden_layers)]
        self.final_norm = LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)

    def __call__(self, batch: Batch) -> list[mx.array]:
        x = self.embeddings.norm(self.embeddings.tok_embeddings(batch.token_ids))
        for layer in self.layers:
            x = layer(x, batch, self._attend, self._act)
        return batch.split(self.final_norm(x))


def rename_modern(weights: dict[str, Any], labels: int) -> dict[str, Any]:
    """Names as ours are; without the head of a language model, or of a model that gives no score."""
    found: dict[str, Any] = {}
    for name, array in weights.items():
        name = name.removeprefix("model.")
        if name.startswith("classifier."):
            name = "head.out." + name.removeprefix("classifier.")
        if name.startswith(("embeddings.", "layers.", "final_norm.")) or (
            labels and name.startswith("head.")
        ):
            found[name] = array
    return found


# ------------------------------------------------------------------- nomic-bert

_GATES: dict[str, Activate] = {"swiglu": silu, "geglu": ACTIVATIONS["gelu"]}


class NomicBertConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of config.json that the arithmetic depends on."""

    model_type: str
    vocab_size: int
    hidden_size: int = msgspec.field(name="n_embd")
    num_hidden_layers: int = msgspec.field(name="n_layer")
    num_attention_heads: int = msgspec.field(name="n_head")
    intermediate_size: int = msgspec.field(name="n_inner")
    n_positions: int
    type_vocab_size: int = 2
    layer_norm_eps: float = msgspec.field(name="layer_norm_epsilon", default=1e-12)
    hidden_act: str = msgspec.field(name="activation_function", default="swiglu")
    qkv_proj_bias: bool = False
    mlp_fc1_bias: bool = False
    mlp_fc2_bias: bool = False
    rotary_emb_base: float = 10_000.0
    rotary_scaling_factor: float | None = None
    max_trained_positions: int = 2048
    rotary_emb_fraction: float = 1.0
    rotary_emb_interleaved: bool = False
    rotary_emb_scale_base: float | None = None
    prenorm: bool = False
    use_rms_norm: bool | None = False
    parallel_block: bool = False
    causal: bool = False
    moe_every_n_layers: int = 0

    @property
    def max_tokens(self) -> int:
        """Rotations are scaled past the trained positions only, which is not done here."""
        trained = self.rotary_scaling_factor is not None
        return min(self.n_positions, self.max_trained_positions) if trained else self.n_positions

    def unknown(self) -> str | None:
        """What it asks for and is not known here."""
        if self.hidden_act not in _GATES:
            return f"the activation {self.hidden_act!r}"
        if self.rotary_emb_fraction != 1:
            return "rotations of a part of each head"
        if self.moe_every_n_layers:
            return "a mixture of experts"
        odd = ("rotary_emb_interleaved", "rotary_emb_scale_base", "prenorm", "use_rms_norm")
        return next((n for n in (*odd, "parallel_block", "causal") if getattr(self, n)), None)


class _NomicEmbeddings(Module):
    def __init__(self, c: NomicBertConfig) -> None:
        super().__init__()
        self.word_embeddings = Embedding(c.vocab_size, c.hidden_size)
        kinds = c.type_vocab_size
        self.token_type_embeddings = Embedding(kinds, c.hidden_size) if kinds else None

    def __call__(self, batch: Batch) -> mx.array:
        x = self.word_embeddings(batch.token_ids)
        kinds = self.token_type_embeddings
        return x if kinds is None else x + kinds(batch.type_ids)


class _NomicMLP(Module):
    def __init__(self, c: NomicBertConfig) -> None:
        super().__init__()
        size, inner = c.hidden_size, c.intermediate_size
        self.fc11 = Linear(size, inner, bias=c.mlp_fc1_bias)
        self.fc12 = Linear(size, inner, bias=c.mlp_fc1_bias)
        self.fc2 = Linear(inner, size, bias=c.mlp_fc2_bias)

    def __call__(self, x: mx.array, act: Activate) -> mx.array:
        return self.fc2(self.fc11(x) * act(self.fc12(x)))


class _NomicLayer(Module):
    def __init__(self, c: NomicBertConfig) -> None:
        super().__init__()
        size, heads = c.hidden_size, c.num_attention_heads
        self.attn = RotaryAttention(size, heads, c.rotary_emb_base, None, bias=c.qkv_proj_bias)
        self.norm1 = LayerNorm(size, eps=c.layer_norm_eps)
        self.mlp = _NomicMLP(c)
        self.norm2 = LayerNorm(size, eps=c.layer_norm_eps)

    def __call__(self, x: mx.array, batch: Batch, attend: Attend, act: Activate) -> mx.array:
        x = self.norm1(x + self.attn(x, batch, attend))
        return self.norm2(x + self.mlp(x, act))


class _NomicHead(Module):
    """`NomicBertForSequenceClassification`'s: BERT's."""

    def __init__(self, c: NomicBertConfig, labels: int) -> None:
        super().__init__()
        self.dense = Linear(c.hidden_size, c.hidden_size)
        self.out = Linear(c.hidden_size, labels)

    def __call__(self, hidden: mx.array) -> mx.array:
        return self.out(mx.tanh(self.dense(hidden[:, 0])))


class NomicBert(TextEncoder):
    def __init__(self, config: NomicBertConfig, labels: int = 0) -> None:
        head = _NomicHead(config, labels) if labels else None
        super().__init__(head, _GATES[config.hidden_act])
        self.embeddings = _NomicEmbeddings(config)
        self.emb_ln = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = [_NomicLayer(config) for _ in range(config.num_hidden_layers)]

    def __call__(self, batch: Batch) -> list[mx.array]:
        x = self.emb_ln(self.embeddings(batch))
        for layer in self.layers:
            x = layer(x, batch, self._attend, self._act)
        return batch.split(x)


def rename_nomic(weights: dict[str, Any], labels: int) -> dict[str, Any]:
    """As `rename_modern`."""
    found: dict[str, Any] = {}
    for name, array in weights.items():
        name = name.removeprefix("bert.").removeprefix("encoder.")
        name = name.replace(".attn.out_proj.", ".attn.Wo.")
        if labels and name.startswith(("pooler.dense.", "classifier.")):
            name = name.replace("pooler.dense.", "head.dense.")
            name = name.replace("classifier.", "head.out.")
            found[name] = array
        if name.startswith(("embeddings.", "emb_ln.", "layers.")):
            found[name] = array
    return found
