"""Every kernel again, slow and obvious, in float32: what the kernels are tested against."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_serving.runtime.native.ops import Activation, Mode

Array = np.ndarray


def _f32(x: mx.array | Array) -> Array:
    return np.array(x.astype(mx.float32)) if isinstance(x, mx.array) else np.asarray(x, np.float32)


def dequantize(
    w: mx.array, scales: mx.array, biases: mx.array | None, group_size: int, bits: int
) -> Array:
    """MLX's affine form as `[n, k]`: code · scale + bias. Without biases a code is E2M1 (4 bits) or E4M3 (8),
    and so is the scale of groups of 16; others' is 2^(scale - 127)."""
    rows = np.array(w)
    stream = np.unpackbits(rows.view(np.uint8), axis=-1, bitorder="little")
    codes = (stream.reshape(rows.shape[0], -1, bits) << np.arange(bits)).sum(-1)
    groups = codes.reshape(rows.shape[0], -1, group_size)
    if biases is None:
        exponents = np.array(scales).astype(np.int32)
        factors = e4m3(exponents) if group_size == 16 else np.ldexp(1.0, exponents - 127)
        half = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
        numbers = e4m3(groups) if bits == 8 else np.concatenate([half, -half])[groups]
        return (numbers * factors[..., None]).astype(np.float32).reshape(rows.shape[0], -1)
    out = groups.astype(np.float32) * _f32(scales)[..., None] + _f32(biases)[..., None]
    return out.reshape(rows.shape[0], -1)


def e4m3(codes: Array) -> Array:
    """8-bit floats: sign, four bits of exponent, three of mantissa. The code for NaN reads as 480."""
    sign, exponent, mantissa = np.where(codes & 128, -1.0, 1.0), codes >> 3 & 15, codes & 7
    normal = np.ldexp(1.0 + mantissa / 8, exponent - 7)
    return sign * np.where(exponent == 0, mantissa * 2.0**-9, normal)


def quantize_activations(x: mx.array | Array, group_size: int, mode: Mode) -> Array:
    """x after the rounding that `mode` gives each group; a group with NaN or infinity becomes NaN."""
    rows = _f32(x)
    if mode == "f32":
        return rows
    groups = rows.reshape(-1, group_size)
    top = np.float32(16256 if mode == "exact" else 127)
    out = np.zeros_like(groups)
    for i, group in enumerate(groups):
        if not np.isfinite(group).all():
            out[i] = np.nan
            continue
        step = np.abs(group).max() / top
        if step > 0:
            out[i] = np.rint(group / step) * step
    return out.reshape(rows.shape)


def linear(
    x: mx.array | Array,
    w: Array,
    bias: mx.array | None = None,
    mode: Mode = "f32",
    group_size: int = 32,
) -> Array:
    """`x @ w.T + bias` in double, for dequantised w."""
    rows = quantize_activations(x, group_size, mode).astype(np.float64)
    out = rows @ w.astype(np.float64).T
    return (out if bias is None else out + _f32(bias)).astype(np.float32)


def gather_linear(
    x: mx.array | Array,
    experts: Sequence[int],
    weights: Sequence[Array],
    mode: Mode,
    group_size: int,
) -> Array:
    """Row by row, each with its expert's `[n, k]`."""
    rows = _f32(x)
    parts = [
        linear(row[None], weights[e], None, mode, group_size)
        for row, e in zip(rows, experts, strict=True)
    ]
    return np.concatenate(parts)


def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> Array:
    rows = _f32(x).astype(np.float64)
    out = rows / np.sqrt((rows**2).mean(-1, keepdims=True) + eps)
    return (out if weight is None else out * _f32(weight)).astype(np.float32)


def rope(
    x: mx.array,
    offsets: Sequence[int],
    inv_freq: Sequence[float],
    traditional: bool,
    magnitude: float = 1.0,
) -> Array:
    """`[batch, heads, length, dim]`, position by position and pair by pair."""
    out = _f32(x).copy()
    half = len(inv_freq)
    for b in range(out.shape[0]):
        for i in range(out.shape[2]):
            for f in range(half):
                angle = float(offsets[b] + i) * float(inv_freq[f])
                c, s = np.cos(angle) * magnitude, np.sin(angle) * magnitude
                j, k = (2 * f, 2 * f + 1) if traditional else (f, f + half)
                first, second = out[b, :, i, j].copy(), out[b, :, i, k].copy()
                out[b, :, i, j] = first * c - second * s
                out[b, :, i, k] = first * s + second * c
    return out


def gated(gate: mx.array, up: mx.array, act: Activation) -> Array:
    g = _f32(gate).astype(np.float64)
    if act == "silu":
        a = g / (1 + np.exp(-g))
    elif act == "gelu_tanh":
        a = 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)))
    else:
        a = np.array(mx.array(g / np.sqrt(2), dtype=mx.float32))
        a = 0.5 * g * (1 + np.array(mx.erf(mx.array(a))))
    return (a * _f32(up)).astype(np.float32)


def kv_write(slab: mx.array, new: mx.array, rows: Sequence[int], offsets: Sequence[int]) -> Array:
    """One slab with `[batch, heads, length, dim]` written at each row's offset."""
    out = _f32(slab).copy()
    values = _f32(new)
    for b, (row, offset) in enumerate(zip(rows, offsets, strict=True)):
        for i in range(values.shape[2]):
            out[row, :, offset + i] = values[b, :, i]
    return out


def attention(
    q: mx.array,
    keys: mx.array,
    values: mx.array,
    rows: Sequence[int],
    offsets: Sequence[int],
    scale: float,
    window: int = 0,
    sinks: mx.array | None = None,
) -> Array:
    """Query by query over the keys that it may see."""
    queries, k, v = (_f32(a).astype(np.float64) for a in (q, keys, values))
    batch, heads, length, _ = queries.shape
    per_kv = heads // k.shape[1]
    out = np.zeros((batch, heads, length, v.shape[3]), np.float32)
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                position = offsets[b] + i
                first = max(0, position + 1 - window) if window else 0
                seen = slice(first, position + 1)
                scores = k[rows[b], h // per_kv, seen] @ queries[b, h, i] * scale
                sink = -np.inf if sinks is None else float(_f32(sinks)[h])
                top = max(scores.max(), sink)
                weights = np.exp(scores - top)
                total = weights.sum() + np.exp(sink - top)
                out[b, h, i] = weights @ v[rows[b], h // per_kv, seen] / total
    return out


def latent_attention(
    q: mx.array,
    latents: mx.array,
    ropes: mx.array,
    rows: Sequence[int],
    offsets: Sequence[int],
    scale: float,
) -> Array:
    keys = mx.concatenate([mx.array(_f32(a)) for a in (latents, ropes)], -1)
    return attention(q, keys, latents, rows, offsets, scale)
