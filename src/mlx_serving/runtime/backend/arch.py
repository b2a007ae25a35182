"""What differs between mlx-lm's architectures, as far as a batched runner must know.

Three things: how a model's caches become row slots (`make_store`, with a table of quirks), how to
apply the vocabulary head to the last position only, and how to have the hidden states without it
(`head_on_last`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module

from mlx_serving.runtime.backend.kv import KVStore, RowSlots, UnsupportedCache
from mlx_serving.runtime.backend.kv_layers import KVLayer, MakeKVLayer
from mlx_serving.runtime.backend.separate_rows import SeparateRows


@dataclass(frozen=True, slots=True)
class Quirk:
    mask_rank: int = 4
    """Rank of a per-row mask that broadcasts against the model's attention scores."""
    separate: bool = False
    """The model reaches into its cache or its offset in a way that only one sequence allows."""


QUIRKS: Mapping[str, Quirk] = {
    # Scores are [rows, kv_heads, repeats, queries, keys].
    "gemma2": Quirk(mask_rank=5),
    # Attention reads and replaces cache.keys itself (sparse indexer kept alive by depends).
    "deepseek_v32": Quirk(separate=True),
    "glm_moe_dsa": Quirk(separate=True),
    "minimax_m3_vl": Quirk(separate=True),
    # Positions pass through numpy.
    "gpt_bigcode": Quirk(separate=True),
    # The chunked mask is built from an integer offset.
    "llama4": Quirk(separate=True),
    # Rotary positions are derived from an integer length.
    "afm7": Quirk(separate=True),
    "internlm3": Quirk(separate=True),
    # The convolution over keys takes the layer's whole state as one sequence's.
    "baichuan_m1": Quirk(separate=True),
}
"""By `model_type`. What needs nothing is not listed: padding, which nemotron_h and rwkv7 cannot
take, never happens here, and idle rows' recurrent state is kept by the store."""


def make_store(
    model: Module,
    model_type: str,
    max_rows: int,
    *,
    bucket: int,
    exact_batch: bool,
    attention: MakeKVLayer = KVLayer,
    in_place: bool = False,
) -> KVStore:
    """The model's KV store: row slots, or separate rows where the architecture allows no other.
    `in_place`: kernels read the attention layers' KV where it lies."""
    quirk = QUIRKS.get(model_type, Quirk())
    if quirk.separate:
        return SeparateRows(model, max_rows)
    try:
        return RowSlots(
            model,
            max_rows,
            bucket=bucket,
            min_slots=max_rows if exact_batch else 1,
            mask_rank=quirk.mask_rank,
            attention=attention,
            in_place=in_place,
        )
    except UnsupportedCache:
        return SeparateRows(model, max_rows)


_BACKBONES = ("model", "backbone", "transformer", "language_model", "gpt_neox")


def head_on_last(model: Module) -> Module | None:
    """Make `model(tokens)` return the last position's logits only, `[rows, 1, vocabulary]`.

    The head costs as much as several layers, and a prompt needs it once. The backbone (the module
    that returns hidden states) is made to return its last position; whatever the model does after
    it (head, tied embedding, scaling, soft cap) works position by position. Returns the backbone,
    whose `hidden(tokens, cache=...)` are all positions' states after the final norm; None where that
    did not hold, by shape: the model is then left alone and the caller takes the last position.
    """
    owner: Any = model
    while True:
        backbone = next((owner[n] for n in _BACKBONES if isinstance(owner.get(n), Module)), None)
        if backbone is None:
            return None
        original = type(backbone)
        backbone.__class__ = _last_position(original)
        if _logits_shape(model)[:2] == (1, 1):
            return backbone
        backbone.__class__ = original
        owner = backbone


_LINES = "_lines_wanted"


@contextmanager
def first_lines(backbone: Module | None, lines: int | None) -> Iterator[None]:
    """Meanwhile the model's logits are those of its first lines only."""
    if backbone is not None:
        object.__setattr__(backbone, _LINES, lines)
    try:
        yield
    finally:
        if backbone is not None:
            object.__setattr__(backbone, _LINES, None)


def _last_position(cls: type[Module]) -> type[Module]:
    def call(self: Module, *args: Any, **kwargs: Any) -> Any:
        hidden = cls.__call__(self, *args, **kwargs)
        is_hidden = isinstance(hidden, mx.array) and hidden.ndim == 3
        return hidden[: getattr(self, _LINES, None), -1:] if is_hidden else hidden

    space = {"__call__": call, "hidden": cls.__call__, "__module__": cls.__module__}
    return type(cls.__name__, (cls,), space)


def _logits_shape(model: Module) -> tuple[int, ...]:
    """Of two tokens' logits; the graph is built and dropped, nothing is computed."""
    from mlx_lm.models.cache import make_prompt_cache

    logits = model(mx.zeros((1, 2), mx.int32), cache=make_prompt_cache(model))
    return logits.shape if isinstance(logits, mx.array) else (0, 0)
