from __future__ import annotations

import mlx.core as mx
import pytest
from mlx.nn.layers.base import Module

from mlx_serving.runtime.backend.weights import (
    PORTION_BYTES,
    cast,
    dtype_name,
    evaluate,
    quantization,
    target_dtype,
)


class Model(Module):
    """One weight whose type the model's file leaves open, one of which it does not, and ids."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = mx.ones((2, 2), mx.bfloat16)
        self.kept = mx.ones((2,), mx.bfloat16)
        self.ids = mx.zeros((2,), mx.int32)

    def cast_predicate(self, name: str) -> bool:
        return name != "kept"


@pytest.mark.parametrize(
    ("dtype", "weight", "kept"),
    [
        (None, mx.bfloat16, mx.bfloat16),
        (mx.float16, mx.float16, mx.bfloat16),
        (mx.float32, mx.float32, mx.float32),
    ],
)
def test_half_types_are_not_for_all(
    dtype: mx.Dtype | None, weight: mx.Dtype, kept: mx.Dtype
) -> None:
    model = Model()
    cast(model, dtype)
    assert (model.weight.dtype, model.kept.dtype, model.ids.dtype) == (weight, kept, mx.int32)


def test_a_cpu_computes_in_float32_unless_it_is_told() -> None:
    assert target_dtype("auto", gpu=False) == mx.float32
    assert target_dtype("auto", gpu=True) is None
    assert target_dtype("bfloat16", gpu=False) == mx.bfloat16


def test_weights_are_read_in_portions() -> None:
    model = Module()
    for name in "abc":
        model[name] = mx.zeros((PORTION_BYTES // 2,), mx.uint8)
    assert len(list(evaluate(model))) == 1
    assert dtype_name(model) == ""
    assert dtype_name(Model()) == "bfloat16"


def test_the_form_is_read_from_the_config() -> None:
    assert quantization({}) is None
    assert quantization({"quantization": {"bits": 4, "group_size": 32}}) == "4-bit group 32"
    assert quantization({"quantization": {"mode": "mxfp4", "bits": 4}}) == "mxfp4"
    assert quantization({"quantization_config": {"quant_method": "bitnet"}}) == "bitnet"
