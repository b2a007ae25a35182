"""Decoders that were made into embedders and classifiers: what mlx-lm needs to load one, and which it cannot
run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_serving.errors import ModelBroken
from mlx_serving.runtime.backend.judge import HEAD
from mlx_serving.runtime.backend.pooling import read_pooling


def check_decoder(path: Path, config: Mapping[str, Any]) -> None:
    """Raises ModelBroken for one whose vectors would be wrong."""
    text = {**(config.get("text_config") or {}), **config}
    if text.get("is_causal") is False or text.get("use_bidirectional_attention"):
        raise ModelBroken(
            f"{path / 'config.json'} asks for attention in both directions, which mlx-lm's "
            f"{config['model_type']} has not"
        )
    mode = read_pooling(path, "last").mode
    if mode not in ("last", "mean"):
        raise ModelBroken(f"{path} asks for the pooling {mode!r} of a decoder; known: last, mean")


def decoder_classes(config: dict[str, Any]) -> tuple[type, type]:
    """mlx-lm's classes for the model, taking weights that were saved without the head's `model.`, and
    leaving a classifier's head to `judge`."""
    from mlx_lm.utils import _get_classes

    model_class, args_class = _get_classes(config)

    def sanitize(self: Any, weights: dict[str, Any]) -> dict[str, Any]:
        weights = {name: array for name, array in weights.items() if name != HEAD}
        if not any(name.startswith("model.") for name in weights):
            weights = {f"model.{name}": array for name, array in weights.items()}
        given = getattr(model_class, "sanitize", None)
        return weights if given is None else given(self, weights)

    space = {"sanitize": sanitize, "__module__": model_class.__module__}
    return type(model_class.__name__, (model_class,), space), args_class
