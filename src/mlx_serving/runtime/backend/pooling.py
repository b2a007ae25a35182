"""From a text's hidden states to its vector, as the model's folder asks for it.

sentence-transformers keeps the recipe in `modules.json`: the transformer, a pooling, then dense
layers and a normalisation, each in a folder of its own. Normalisation is left to who asks for the
vector; a step that is not known here is refused when the model is loaded, by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import msgspec
import numpy as np

from mlx_serving.errors import ModelBroken
from mlx_serving.runtime.backend.loader import read_json

Mode = Literal["mean", "cls", "max", "last"]

_FLAGS: Mapping[str, Mode] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last",
}
_NAMES: Mapping[str, Mode] = {"cls": "cls", "mean": "mean", "max": "max", "lasttoken": "last"}
_POOL: Mapping[Mode, Callable[[mx.array], mx.array]] = {
    "mean": lambda hidden: hidden.mean(-2),
    "cls": lambda hidden: hidden[..., 0, :],
    "max": lambda hidden: hidden.max(-2),
    "last": lambda hidden: hidden[..., -1, :],
}
_ACTIVATIONS: Mapping[str, Callable[[mx.array], mx.array]] = {
    "Identity": lambda x: x,
    "Tanh": mx.tanh,
    "Sigmoid": mx.sigmoid,
    "ReLU": lambda x: mx.maximum(x, 0),
}


def activation(name: str, path: Path) -> Callable[[mx.array], mx.array]:
    """By the name of torch's class, with or without its module."""
    found = _ACTIVATIONS.get(name.rpartition(".")[2])
    if found is None:
        raise ModelBroken(f"{path} asks for the activation {name!r}, which is not known here")
    return found


def score_activation(path: Path, config: Mapping[str, Any]) -> Callable[[mx.array], mx.array]:
    """What becomes of a classifier's one logit: a sigmoid, unless the config names something else."""
    section = config.get("sentence_transformers")
    asked = section.get("activation_fn") if isinstance(section, dict) else None
    asked = asked or config.get("sbert_ce_default_activation_function") or "Sigmoid"
    return activation(str(asked), path / "config.json")


@dataclass(frozen=True, slots=True)
class Dense:
    """A linear layer over pooled vectors."""

    weight: mx.array
    """`[outputs, inputs]`"""
    bias: mx.array | None
    activation: Callable[[mx.array], mx.array]

    def __call__(self, x: mx.array) -> mx.array:
        y = x @ self.weight.T
        return self.activation(y if self.bias is None else y + self.bias)


@dataclass(frozen=True, slots=True)
class Pooling:
    mode: Mode
    dense: tuple[Dense, ...] = ()

    def __call__(self, hidden: mx.array) -> mx.array:
        """`[…, tokens, hidden]` to `[…, size]`."""
        return self.finish(_POOL[self.mode](hidden))

    def finish(self, pooled: mx.array) -> mx.array:
        for layer in self.dense:
            pooled = layer(pooled)
        return pooled

    def size(self, hidden_size: int) -> int:
        return self.dense[-1].weight.shape[0] if self.dense else hidden_size


def read_pooling(path: Path, default: Mode) -> Pooling:
    """What the folder asks for; `default` where it says nothing. Raises ModelBroken."""
    mode, dense = default, []
    for module in _modules(path):
        kind, folder = module["type"].rpartition(".")[2], path / module["path"]
        if kind == "Pooling":
            mode = _mode(folder / "config.json")
        elif kind == "Dense":
            dense.append(_dense(folder))
        elif kind not in ("Transformer", "Normalize"):
            raise ModelBroken(f"{path / 'modules.json'} has a {kind}, which is not known here")
    return Pooling(mode, tuple(dense))


def is_embedder(path: Path) -> bool:
    """Whether the folder is one of sentence-transformers'."""
    return (path / "modules.json").is_file()


def max_seq_length(path: Path) -> int | None:
    """Tokens that the folder allows in a text, special tokens included."""
    for name in ("sentence_bert_config.json", "sentence_roberta_config.json"):
        value = read_json(path / name).get("max_seq_length")
        if isinstance(value, int) and value > 0:
            return value
    return None


def read_prompts(path: Path) -> tuple[dict[str, str], str | None]:
    """The texts that sentence-transformers would put before others, by name, and the default's name."""
    config = read_json(path / "config_sentence_transformers.json")
    given = config.get("prompts")
    prompts = {str(k): str(v) for k, v in given.items() if v} if isinstance(given, dict) else {}
    default = config.get("default_prompt_name")
    return prompts, default if default in prompts else None


class _Module(msgspec.Struct):
    type: str
    path: str = ""


def _modules(path: Path) -> list[dict[str, str]]:
    file = path / "modules.json"
    if not file.is_file():
        return []
    try:
        modules = msgspec.json.decode(file.read_bytes(), type=list[_Module])
    except (OSError, msgspec.DecodeError) as error:
        raise ModelBroken(f"{file} cannot be read: {error}") from error
    return [{"type": module.type, "path": module.path} for module in modules]


def _mode(file: Path) -> Mode:
    config = read_json(file, required=True)
    asked = config.get("pooling_mode")
    names = asked.split("+") if isinstance(asked, str) else []
    names += [k for k, on in config.items() if k.startswith("pooling_mode_") and on is True]
    modes = {_FLAGS.get(name) or _NAMES.get(name) for name in names}
    mode = next(iter(modes)) if len(modes) == 1 else None
    if mode is None:
        raise ModelBroken(
            f"{file} asks for the pooling {' and '.join(names) or 'of no kind'}; known are "
            "one of mean, cls, max and lasttoken"
        )
    if config.get("include_prompt") is False:
        raise ModelBroken(f"{file} leaves prompts out of the pooling, which is not known here")
    return mode


def _dense(folder: Path) -> Dense:
    config = read_json(folder / "config.json", required=True)
    file = folder / "model.safetensors"
    try:
        weights: Any = mx.load(str(file))
        weight, bias = weights["linear.weight"], weights.get("linear.bias")
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise ModelBroken(f"{file} cannot be read: {error}") from error
    name = str(config.get("activation_function", "Tanh"))
    bias = None if bias is None else bias.astype(mx.float32)
    return Dense(weight.astype(mx.float32), bias, activation(name, folder / "config.json"))


def to_bytes(vector: mx.array) -> bytes:
    """float32, little-endian. Waits for the vector."""
    return np.array(vector.astype(mx.float32)).astype("<f4").tobytes()


class RowPooler:
    """Pools texts that a decoder computes chunk by chunk, one a row. Knows `last` and `mean`, which
    do not need all states at once."""

    def __init__(self, pooling: Pooling | None = None) -> None:
        self._pooling = pooling or Pooling("last")
        assert self._pooling.mode in ("last", "mean"), self._pooling.mode
        self._sums: dict[int, mx.array] = {}
        """By row: of the states so far."""

    def add(self, row: int, hidden: mx.array, start: int, *, ends: bool) -> mx.array:
        """The next states `[tokens, hidden]`, from position `start` on. Returns the vector if the text
        `ends` with them; otherwise what stands for them."""
        if self._pooling.mode == "last":
            last = hidden[-1].astype(mx.float32)
            return self._pooling.finish(last) if ends else last
        total = hidden.astype(mx.float32).sum(0)
        if start > 0:
            total = self._sums.pop(row) + total
        if ends:
            return self._pooling.finish(total / (start + hidden.shape[0]))
        self._sums[row] = total
        return total

    def move(self, source: int, target: int) -> None:
        if source in self._sums:
            self._sums[target] = self._sums.pop(source)

    def free(self, row: int) -> None:
        self._sums.pop(row, None)

    def reset(self) -> None:
        self._sums.clear()
