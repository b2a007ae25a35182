"""GGUF blocks as MLX arrays: Q4_0, Q4_1 and Q8_0 bit for bit, every other type as floats.

MLX's affine quantisation is w = scale * q + bias for groups of 32 with unsigned q. Q4_0
(d * (q - 8)) and Q8_0 (d * q, signed) become it with bias = -8 d and -128 d: powers of two
times d, so exact in float16 as long as they do not overflow.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

FloatType = Literal["float32", "float16", "bfloat16"]
GROUP_SIZE = 32
KEPT_BITS = {
    GGMLQuantizationType.Q4_0: 4,
    GGMLQuantizationType.Q4_1: 4,
    GGMLQuantizationType.Q8_0: 8,
}
"""Types that stay quantised, and the bits MLX keeps them in."""

Bytes = npt.NDArray[np.uint8]


class Packed(NamedTuple):
    """`weight` uint32 [rows, columns * bits / 32]; `scales`, `biases` float16 [rows, columns / 32]."""

    weight: npt.NDArray[np.uint32]
    scales: npt.NDArray[np.float16]
    biases: npt.NDArray[np.float16]


def repack(kind: GGMLQuantizationType, rows: Bytes) -> Packed:
    """`rows`: uint8 [n, bytes a row] of a type in KEPT_BITS. Raises OverflowError when a scale is
    too large for its bias to be a float16 (no trained model has one)."""
    n = rows.shape[0]
    width = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}[kind.name]
    blocks = rows.reshape(n, -1, width)
    scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
    with np.errstate(over="ignore", invalid="ignore"):
        if kind is GGMLQuantizationType.Q4_1:
            biases = np.ascontiguousarray(blocks[..., 2:4]).view(np.float16)[..., 0]
        else:
            biases = scales * np.float16(-8 if kind is GGMLQuantizationType.Q4_0 else -128)
    if not (np.isfinite(scales).all() and np.isfinite(biases).all()):
        raise OverflowError("a scale does not fit float16")
    if kind is GGMLQuantizationType.Q8_0:
        packed = blocks[..., 2:] ^ np.uint8(0x80)
    else:
        packed = _pair_nibbles(blocks[..., width - 16 :])
    weight = np.ascontiguousarray(packed).reshape(n, -1).view(np.uint32)
    return Packed(weight, np.ascontiguousarray(scales), np.ascontiguousarray(biases))


def _pair_nibbles(quants: Bytes) -> Bytes:
    """GGUF holds element i beside i + 16 in a byte, MLX element 2 i beside 2 i + 1."""
    q = np.concatenate([quants & np.uint8(15), quants >> np.uint8(4)], axis=-1)
    paired: Bytes = q[..., 0::2] | (q[..., 1::2] << np.uint8(4))
    return paired


def to_float32(kind: GGMLQuantizationType, rows: Bytes) -> npt.NDArray[np.float32]:
    """float32 [n, columns]. Raises NotImplementedError for a type the gguf package cannot decode."""
    if kind is GGMLQuantizationType.F16:
        return rows.view(np.float16).astype(np.float32)
    if kind is GGMLQuantizationType.F64:
        return rows.view(np.float64).astype(np.float32)
    if kind is GGMLQuantizationType.F32:
        return rows.view(np.float32)
    values: npt.NDArray[np.float32] = dequantize(rows, kind)
    return values


def from_float32(values: npt.NDArray[np.float32], dtype: FloatType) -> npt.NDArray[np.generic]:
    """Rounded to nearest even; bfloat16 as its uint16 bits, which numpy has no type for."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    with np.errstate(over="ignore"):
        return values.astype(dtype)
