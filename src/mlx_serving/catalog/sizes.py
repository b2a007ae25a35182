"""What a config.json says of a model's sizes. One that is 0, or missing, would come out while the model
is made, as an arithmetic error that names no field."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from mlx_serving.catalog.architectures import arguments
from mlx_serving.catalog.folder import Problem

SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "n_embd",
    "n_layer",
    "n_head",
)
MAX_SHOWN_CHARS = 40


def check_sizes(config: Mapping[str, Any]) -> list[Problem]:
    """One problem for each field that is wrong, and one for all that are missing."""
    found = [*_wrong(config), *_missing(config)]
    return [Problem(file="config.json", kind="bad_file", detail=detail) for detail in found]


def _wrong(config: Mapping[str, Any]) -> Iterator[str]:
    read, text = arguments(config), config.get("text_config")
    for name in SIZES:
        if read is None or name in read.known:
            yield from _not_a_size(name, config.get(name))
        if isinstance(text, dict):
            yield from _not_a_size(f"text_config.{name}", text.get(name))


def _not_a_size(name: str, value: object) -> Iterator[str]:
    """Null is the architecture's own default, and a list has a size for each layer."""
    if isinstance(value, bool | str) or (isinstance(value, int | float) and value <= 0):
        yield f"{name} is {json.dumps(value)[:MAX_SHOWN_CHARS]}, which is no size"


def _missing(config: Mapping[str, Any]) -> Iterator[str]:
    read = arguments(config)
    required = read.required if read else ()
    missing = [n for n in required if n not in config or (n in SIZES and config[n] is None)]
    if missing:
        yield f"has no {', '.join(missing)}"
