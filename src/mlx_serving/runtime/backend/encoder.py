"""Encoders in MLX: hidden states of many texts in one pass, without padding; and BERT's family of them.

A batch's texts stand one after another in one array `[tokens, hidden]`, so that the layers that
work token by token see one tall matrix. Attention sees the texts apart, those of equal length
together. No mask and no padding enter a text's arithmetic: its states depend on its own tokens,
and on its neighbours only as far as a matrix product's rounding depends on its number of rows.

Weights have Hugging Face's names. RoBERTa's family counts positions from `pad_token_id` + 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import mlx.core as mx
import msgspec
from mlx.nn.layers.activations import gelu, gelu_approx, relu
from mlx.nn.layers.base import Module
from mlx.nn.layers.embedding import Embedding
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.normalization import LayerNorm

Attend = Callable[[mx.array, mx.array, mx.array, float], mx.array]
"""Queries, keys and values `[texts, heads, length, dim]`, and the scale; every position sees all."""
Activate = Callable[[mx.array], mx.array]


class EncoderConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of config.json that the arithmetic depends on."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    pad_token_id: int | None = None
    position_embedding_type: str = "absolute"

    @property
    def first_position(self) -> int:
        if self.model_type == "bert":
            return 0
        return 2 if self.pad_token_id is None else self.pad_token_id + 1

    @property
    def max_tokens(self) -> int:
        """Of one text."""
        return self.max_position_embeddings - self.first_position

    def unknown(self) -> str | None:
        """What it asks for and is not known here."""
        if self.position_embedding_type != "absolute":
            return f"{self.position_embedding_type} positions"
        if self.hidden_act not in ACTIVATIONS:
            return f"the activation {self.hidden_act!r}"
        return None


@dataclass(frozen=True, slots=True)
class Batch:
    """Texts side by side, those of equal length together."""

    token_ids: mx.array
    """int32 `[tokens]`"""
    type_ids: mx.array
    positions: mx.array
    """Within each text, from 0."""
    groups: tuple[tuple[int, int], ...]
    """(texts, length), in the order of the tokens."""
    order: tuple[int, ...]
    """The index that each text had before they were sorted."""

    def split(self, x: mx.array) -> list[mx.array]:
        """`[tokens, n]` as one `[texts, length, n]` a group."""
        parts, start = [], 0
        for texts, length in self.groups:
            end = start + texts * length
            parts.append(x[start:end].reshape(texts, length, -1))
            start = end
        return parts


def pack(texts: Sequence[Sequence[int]], second_at: Sequence[int | None]) -> Batch:
    """Texts as token ids; where the second text of a pair begins in each."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    token_ids: list[int] = []
    type_ids: list[int] = []
    positions: list[int] = []
    for i in order:
        length, second = len(texts[i]), second_at[i]
        token_ids += texts[i]
        positions += range(length)
        first = length if second is None else second
        type_ids += [0] * first + [1] * (length - first)
    lengths = [len(texts[i]) for i in order]
    return Batch(
        token_ids=mx.array(token_ids, dtype=mx.int32),
        type_ids=mx.array(type_ids, dtype=mx.int32),
        positions=mx.array(positions, dtype=mx.int32),
        groups=tuple((len(list(same)), length) for length, same in groupby(lengths)),
        order=tuple(order),
    )


def attend(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)


ACTIVATIONS: dict[str, Activate] = {
    "gelu": gelu,
    "gelu_new": gelu_approx,
    "gelu_pytorch_tanh": gelu_approx,
    "gelu_fast": gelu_approx,
    "relu": relu,
}


class Embeddings(Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.word_embeddings = Embedding(config.vocab_size, size)
        self.position_embeddings = Embedding(config.max_position_embeddings, size)
        self.token_type_embeddings = Embedding(config.type_vocab_size, size)
        self.LayerNorm = LayerNorm(size, eps=config.layer_norm_eps)

    def __call__(self, batch: Batch, first_position: int) -> mx.array:
        x = self.word_embeddings(batch.token_ids)
        x = x + self.position_embeddings(batch.positions + first_position)
        return self.LayerNorm(x + self.token_type_embeddings(batch.type_ids))


class Layer(Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        size, inner, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.heads = config.num_attention_heads
        self.query = Linear(size, size)
        self.key = Linear(size, size)
        self.value = Linear(size, size)
        self.attention_out = Linear(size, size)
        self.attention_norm = LayerNorm(size, eps=eps)
        self.up = Linear(size, inner)
        self.down = Linear(inner, size)
        self.norm = LayerNorm(size, eps=eps)

    def __call__(self, x: mx.array, batch: Batch, attend: Attend, act: Activate) -> mx.array:
        mixed = self._attention(x, batch, attend)
        x = self.attention_norm(x + self.attention_out(mixed))
        return self.norm(x + self.down(act(self.up(x))))

    def _attention(self, x: mx.array, batch: Batch, attend: Attend) -> mx.array:
        size = x.shape[-1]
        dim = size // self.heads
        mixed = []
        parts = (batch.split(projection(x)) for projection in (self.query, self.key, self.value))
        for qkv in zip(*parts, strict=True):
            q, k, v = (
                part.reshape(*part.shape[:2], self.heads, dim).transpose(0, 2, 1, 3) for part in qkv
            )
            out = attend(q, k, v, 1 / math.sqrt(dim))
            mixed.append(out.transpose(0, 2, 1, 3).reshape(-1, size))
        return mx.concatenate(mixed)


class BertHead(Module):
    """`BertForSequenceClassification`'s: the first token through the pooler, then the classifier."""

    def __init__(self, size: int, labels: int) -> None:
        super().__init__()
        self.dense = Linear(size, size)
        self.out = Linear(size, labels)

    def __call__(self, hidden: mx.array) -> mx.array:
        return self.out(mx.tanh(self.dense(hidden[:, 0])))


class TextEncoder(Module):
    """`attend` and `act` may be replaced by faster ones. `head` is there where a score is wanted: it
    makes `[texts, 1]` of `[texts, length, hidden]`."""

    def __init__(self, head: Module | None, act: Activate) -> None:
        super().__init__()
        self.head = head
        self._attend: Attend = attend
        self._act: Activate = act

    def use(self, attend: Attend | None, act: Activate | None) -> None:
        """Other ways to compute the same."""
        self._attend = attend or self._attend
        self._act = act or self._act

    def __call__(self, batch: Batch) -> list[mx.array]:
        """Hidden states `[texts, length, hidden]` of each of the batch's groups."""
        raise NotImplementedError


class Encoder(TextEncoder):
    """BERT, RoBERTa, XLM-RoBERTa."""

    def __init__(self, config: EncoderConfig, labels: int = 0) -> None:
        head = BertHead(config.hidden_size, labels) if labels else None
        super().__init__(head, ACTIVATIONS[config.hidden_act])
        self.embeddings = Embeddings(config)
        self.layers = [Layer(config) for _ in range(config.num_hidden_layers)]
        self._config = config

    def __call__(self, batch: Batch) -> list[mx.array]:
        x = self.embeddings(batch, self._config.first_position)
        for layer in self.layers:
            x = layer(x, batch, self._attend, self._act)
        return batch.split(x)


_RENAMED = (
    ("attention.self.query.", "query."),
    ("attention.self.key.", "key."),
    ("attention.self.value.", "value."),
    ("attention.output.dense.", "attention_out."),
    ("attention.output.LayerNorm.", "attention_norm."),
    ("intermediate.dense.", "up."),
    ("output.dense.", "down."),
    ("output.LayerNorm.", "norm."),
)
_HEADS = {
    "pooler.dense.": "head.dense.",
    "classifier.dense.": "head.dense.",
    "classifier.out_proj.": "head.out.",
    "classifier.": "head.out.",
}


def rename(weights: dict[str, Any], labels: int) -> dict[str, Any]:
    """Hugging Face's names to ours. What the arithmetic does not need is left out: stored positions,
    a language model's head, the pooler of a model that gives no score."""
    found: dict[str, Any] = {}
    for name, array in weights.items():
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
            "LayerNorm.beta", "LayerNorm.bias"
        )
        head = next((k for k in _HEADS if k in name), None)
        if head is not None:
            if labels:
                found[_HEADS[head] + name.partition(head)[2]] = array
        elif "encoder.layer." in name:
            index, _, rest = name.partition("encoder.layer.")[2].partition(".")
            found[f"layers.{index}.{_layer_name(rest)}"] = array
        elif "embeddings." in name and not name.endswith("position_ids"):
            found["embeddings." + name.partition("embeddings.")[2]] = array
    return found


def _layer_name(rest: str) -> str:
    for theirs, ours in _RENAMED:
        if rest.startswith(theirs):
            return ours + rest.removeprefix(theirs)
    return rest
