"""The kernels as typed functions over `mx.array`; see `reference` for their meaning.

All are lazy MLX operations on the CPU's default stream, and raise ValueError for operands of wrong
shape or type. Values known only when the graph runs (rows, offsets, token ids) raise when it does.
Activations and slabs are float32, float16 or bfloat16; arithmetic is float32 inside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import mlx.core as mx

from mlx_serving.runtime.native._load import require

Mode = Literal["exact", "fast", "f32"]
"""How activations enter a quantised matmul: two int8 planes a group (about 15 bits), one, or as
they are. In each, a row's result does not depend on the rows beside it."""

Activation = Literal["silu", "gelu_tanh", "gelu_erf"]

Packed = Any
"""A packed weight: `.n` outputs, `.k` inputs, `.bits`, `.group_size`, `.nbytes`, their `.address`, and
`.slice(start, stop)`, outputs that share its memory (start a multiple of 16)."""

KVCode = tuple[int, int, int, mx.Dtype]
"""How a slab of uint32 keeps a vector: bits (8 or 4), group (32 or 64), numbers, and the type of scales
and biases. Its words are mx.quantize's codes along the vector, then all scales, then all biases."""

RopeTable = Any
"""Cosines and sines by position, extended as needed: `.dims`, `.traditional`."""


SampleLines = Any
"""What `sample_lines` gives."""


class SampleLine(NamedTuple):
    """How one line of a batch chooses its token. `bias`, `counts` and `ban` name rows of `sample`'s
    tables, -1 for none."""

    temperature: float = 0.0
    """0: the likeliest token."""
    top_k: int = 0
    """0: all."""
    top_p: float = 1.0
    log_min_p: float = -math.inf
    key0: int = 0
    key1: int = 0
    """Of the random numbers; the position is mixed into the second."""
    bias: int = -1
    counts: int = -1
    ban: int = -1
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    ban_until: int = 0
    """A ban holds for positions below this."""


def pack_quantized(
    w: mx.array, scales: mx.array, biases: mx.array | None, group_size: int, bits: int
) -> Packed:
    """MLX's affine form `[n, k·bits/32]`, `[n, k/group_size]` ×2, packed; without biases mxfp4, nvfp4 or mxfp8.

    Bits 2 to 6 and 8 (2 and 3 are kept as 4, 5 and 6 as 8), groups 32, 64, 128. Without biases, 4 bits in
    groups of 32 are mxfp4, in groups of 16 nvfp4, and 8 in groups of 32 mxfp8, whose activations are as
    they are in every mode. Scales are kept in half precision where that loses nothing.
    """
    return require().pack_quantized(w, scales, biases, group_size, bits)


def pack_dense(w: mx.array) -> Packed:
    """`[n, k]` of float32, float16 or bfloat16, packed in its own type."""
    return require().pack_dense(w)


def linear(x: mx.array, w: Packed, bias: mx.array | None = None, mode: Mode = "exact") -> mx.array:
    """`x @ w.T + bias`: `[…, k]` to `[…, n]` in x's type."""
    return require().linear(x, w, bias, mode)


def gather_linear(
    x: mx.array, experts: mx.array, w: Packed, n: int, mode: Mode = "exact"
) -> mx.array:
    """Each row of `[…, k]` times its expert's weight: `[…, n]`. Expert e has w's outputs from `e·n` on
    (n a multiple of 16); experts int32 `[…]`."""
    return require().gather_linear(x, experts, w, n, mode)


def embed(ids: mx.array, w: Packed, dtype: mx.Dtype) -> mx.array:
    """Rows `ids` `[…]` of w, dequantised: `[…, k]`."""
    return require().embed(ids, w, dtype)


def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
    """Over the last axis; weight `[k]` or None."""
    return require().rms_norm(x, weight, eps)


def rope_table(inv_freq: Sequence[float], traditional: bool, magnitude: float = 1.0) -> RopeTable:
    """Angles `position · inv_freq[i]` (radians); `magnitude` scales cosines and sines (yarn, longrope)."""
    return require().rope_table([float(f) for f in inv_freq], traditional, magnitude)


def rope(x: mx.array, offsets: mx.array | int, table: RopeTable) -> mx.array:
    """Rotate the first `table.dims` of `[batch, …, length, dim]`; offsets an int or int32 `[batch]`."""
    if not isinstance(offsets, mx.array):
        offsets = mx.array([offsets], dtype=mx.int32)
    return require().rope(x, offsets, table)


def gated(gate: mx.array, up: mx.array, act: Activation) -> mx.array:
    """`act(gate) * up`, same shapes."""
    return require().gated(gate, up, act)


def kv_write(
    keys: mx.array,
    values: mx.array,
    k: mx.array,
    v: mx.array,
    rows: mx.array,
    offsets: mx.array,
    key_code: KVCode | None = None,
    value_code: KVCode | None = None,
) -> tuple[mx.array, mx.array]:
    """Slabs `[slots, heads, capacity, dim]` with `[batch, heads, length, dim]` written at each row's offset;
    quantised for a slab of uint32 `[…, words]`, which has a code.

    The results take the slabs' memory, so the arrays passed in, and lazy views of them, must not be
    used again (copy what has to stay, and evaluate the copy first). `rows` and `offsets` are int32
    `[batch]`; a position beyond the capacity raises when the graph runs.
    """
    keys, values = require().kv_write(keys, values, k, v, rows, offsets, key_code, value_code)
    return keys, values


def can_reserve(nbytes: int, pieces: int) -> bool:
    """So much address space can be had in so many pieces, beyond the machine's memory if need be."""
    return bool(require().can_reserve(nbytes, pieces))


def reserve(shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    """Zeros that take memory, a page at a time, as they are written. Raises MemoryError."""
    reserved = require().reserve(list(shape), dtype)
    # MLX takes address space for memory, and beyond its own limit every operation waits for those before
    # it, on a busy processor. What there is room for is decided elsewhere (`core.memory`).
    mx.set_memory_limit(1 << 62)
    return reserved


def give_back(slabs: Sequence[mx.array], row: int) -> list[mx.array]:
    """Reserved slabs `[slots, …]` without the memory behind one row, which is zeros again. Slabs are
    handed over, as by `kv_write`."""
    return require().give_back(list(slabs), row)


def put(target: mx.array, value: mx.array, rows: Sequence[int]) -> mx.array:
    """`target[rows] = value` where it lies, or `target[rows, :, :n] = value` for a value of `n` < the target's
    positions along axis 2. The target is handed over, as by `kv_write`; the dtypes are the same."""
    return require().put(target, value, list(rows))


def attention(
    q: mx.array,
    keys: mx.array,
    values: mx.array,
    rows: mx.array,
    offsets: mx.array,
    scale: float,
    window: int = 0,
    sinks: mx.array | None = None,
    key_code: KVCode | None = None,
    value_code: KVCode | None = None,
) -> mx.array:
    """Causal attention over slabs read in place, quantised ones included.

    Query `[b, h, i]` of `[batch, heads, length, dim]` stands at position `offsets[b] + i` of slab row
    `rows[b]` and sees that row's positions up to its own, the last `window` of them if window > 0.
    Dims are multiples of 16. `sinks` `[heads]` are logits of keys without a value. A position's
    output has the same bits whatever else the call computes.
    """
    return require().attention(
        q, keys, values, rows, offsets, scale, window, sinks, key_code, value_code
    )


def latent_attention(
    q: mx.array,
    latents: mx.array,
    ropes: mx.array,
    rows: mx.array,
    offsets: mx.array,
    scale: float,
    latent_code: KVCode | None = None,
    rope_code: KVCode | None = None,
) -> mx.array:
    """`attention` where a position's key is its latent and its rope part side by side, its value the latent.

    Slabs `[slots, 1, capacity, dim]` of either; q `[batch, heads, length, both dims]`, absorbed.
    """
    codes = latent_code, rope_code
    return require().attention(
        q, latents, ropes, rows, offsets, scale, 0, None, *codes, latent=True
    )


def sample_lines(lines: Sequence[SampleLine]) -> SampleLines:
    """A batch's description, for as many calls of `sample` as it stays the same."""
    return require().sample_lines(list(lines))


def sample(
    logits: mx.array,
    lines: SampleLines,
    positions: Sequence[int],
    *,
    allowed: mx.array | None = None,
    bias: mx.array | None = None,
    ban: mx.array | None = None,
    output: mx.array | None = None,
    prompt: mx.array | None = None,
) -> mx.array:
    """A token for each line of `[lines, vocabulary]`: int32 `[lines]`.

    In this order: what `allowed` (uint8 `[lines, vocabulary / 8]`, low bit first) leaves out becomes
    -inf; `bias` is added; penalties by the counts `output` and `prompt`; `ban` is added while a
    position is below its line's `ban_until`, unless that leaves nothing; then temperature, top-k, top-p,
    min-p and a draw keyed by (key0, key1 ^ position). `backend.sampler` is the reference.
    """
    return require().sample(logits, lines, list(positions), allowed, bias, ban, output, prompt)
