"""A model's weights on their way into memory: in which type, read in which portions; and what they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten, tree_map_with_path

from mlx_serving.runtime.slices import Slices

PORTION_BYTES = 32 << 20
"""Of the weights: read between two steps of other models."""


def target_dtype(dtype: str, gpu: bool) -> mx.Dtype | None:
    """None: as stored, or on the CPU `auto`: half types become f32, whose kernels are 20-40 times
    faster there, and more exact."""
    if dtype == "auto":
        return None if gpu else mx.float32
    named: Mapping[str, mx.Dtype] = {
        "float32": mx.float32,
        "float16": mx.float16,
        "bfloat16": mx.bfloat16,
    }
    return named[dtype]


def cast(model: Module, dtype: mx.Dtype | None) -> None:
    """To a type, but what the model's file keeps out of half types; None: as stored. Nothing is read."""
    if dtype is None:
        return
    may_cast = getattr(model, "cast_predicate", lambda _: True)

    def one(name: str, array: Any) -> Any:
        if not isinstance(array, mx.array) or not mx.issubdtype(array.dtype, mx.floating):
            return array
        return array.astype(dtype) if dtype == mx.float32 or may_cast(name) else array

    model.update(tree_map_with_path(one, model.parameters()))


def evaluate(model: Module) -> Slices[None]:
    """Read the weights."""
    # Layers are born with random weights that nobody computes; the generator's key would remember each.
    mx.eval(mx.random.state)
    some: list[mx.array] = []
    for array in arrays(model):
        some.append(array)
        if sum(one.nbytes for one in some) >= PORTION_BYTES:
            mx.eval(some)
            some = []
            yield
    mx.eval(some)


def arrays(model: Module) -> list[mx.array]:
    flat: Any = tree_flatten(model.parameters())
    return [array for _, array in flat]


def dtype_name(model: Module) -> str:
    for array in arrays(model):
        if mx.issubdtype(array.dtype, mx.floating):
            return str(array.dtype).rsplit(".", 1)[-1]
    return ""


def quantization(config: Mapping[str, Any]) -> str | None:
    """`4-bit group 32`, or a mode's own name; None if the weights are not quantised."""
    q = config.get("quantization") or config.get("quantization_config")
    if not isinstance(q, Mapping):
        return None
    if q.get("mode", "affine") != "affine":
        return str(q["mode"])
    if "bits" not in q:
        return str(q.get("quant_method", "quantised"))
    return f"{q['bits']}-bit group {q.get('group_size', 64)}"
