"""Where a loaded model's weights lie in memory, the kernels' packed ones included."""

from __future__ import annotations

import ctypes

import mlx.core as mx
from mlx.nn.layers.base import Module

from mlx_serving.runtime.backend.model import Span, Weights

_STRIDED = 0x18
"""PyBUF_STRIDES."""


def weights_of(model: Module, held_bytes: int, gpu: bool) -> Weights:
    """`held_bytes` as in `ModelInfo`."""
    if gpu:
        return Weights("metal" if mx.metal.is_available() else "cuda", held_bytes, list)
    return Weights("cpu", held_bytes, lambda: spans_of(model))


def spans_of(model: Module) -> list[Span]:
    """Of a model on the CPU. Layers that share memory give the same spans."""
    spans = []
    for _, module in model.named_modules():
        spans += [span_of(v) for v in module.values() if isinstance(v, mx.array) and v.size]
        packed = module.__dict__.get("_packed")
        if packed is not None:
            spans.append(Span(packed.address, packed.nbytes))
    return spans


class _Buffer(ctypes.Structure):
    """CPython's Py_buffer. numpy has no bfloat16, so arrays cannot be asked through it."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.POINTER(ctypes.c_ssize_t)),
        ("strides", ctypes.POINTER(ctypes.c_ssize_t)),
        ("suboffsets", ctypes.POINTER(ctypes.c_ssize_t)),
        ("internal", ctypes.c_void_p),
    )


def span_of(array: mx.array) -> Span:
    """From its first to its last element."""
    view = _Buffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(array), ctypes.byref(view), _STRIDED)
    try:
        steps = [(view.shape[i] - 1) * view.strides[i] for i in range(view.ndim)]
        return Span(view.buf or 0, sum(steps) + view.itemsize)
    finally:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(view))
