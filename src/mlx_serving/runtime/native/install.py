"""Moves a loaded model's layers to the kernels, instance by instance; no class is patched."""

from __future__ import annotations

import copy
import inspect
import re
import sys
import types
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.embedding import Embedding
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.normalization import LayerNorm, RMSNorm
from mlx.nn.layers.quantized import QuantizedEmbedding, QuantizedLinear
from mlx_lm.models import gemma, gemma2, gemma3_text
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlx_serving.runtime.native import _load, latent, layers, ops, slab
from mlx_serving.runtime.native.fused import fuse
from mlx_serving.runtime.slices import Slices, whole

GEMMA_NORMS = (gemma.RMSNorm, gemma2.RMSNorm, gemma3_text.RMSNorm)
"""RMSNorms that multiply by 1 + weight."""

_READS_WEIGHTS = re.compile(r"\b(\w+)\.(?:weight|scales|biases)\b")
"""A layer whose own arrays a model file uses by name, so that they have to stay."""


@dataclass
class Report:
    """What `accelerate` did, for logs and `doctor`."""

    isa: str
    mode: ops.Mode
    replaced: dict[str, int] = field(default_factory=dict)
    """Class name of each kind of layer moved, and how many."""
    left: list[str] = field(default_factory=list)
    """Paths of linear layers that no kernel takes (other formats, odd shapes)."""
    fused: str = ""
    """The fused decoder's family, or why there is none, after `not fused: `."""
    row_mask: bool = False
    """The model's attention calls `scaled_dot_product_attention`, which takes a `RowMask` here. Whether
    the model does nothing else with its masks and keys is for the cache's owner to try."""
    every_product: bool = False
    """No weight is multiplied outside the kernels, so a position's result cannot depend on others
    through a matrix product of MLX's."""
    packed_bytes: int = 0
    """Memory of the packed weights, which replace the model's own."""

    @property
    def is_fused(self) -> bool:
        return bool(self.fused) and not self.fused.startswith("not ")


def accelerate(
    model: Module,
    mode: ops.Mode = "exact",
    *,
    fused: bool = True,
    kv_dtype: mx.Dtype | None = None,
) -> Report:
    """Move the model's layers to the kernels, in place. Adapters must have been applied before.

    `kv_dtype` (float32, float16, bfloat16) is what a fused decoder asks its slabs to be; by default
    the type of the embedding's scales. Raises RuntimeError if the kernels are not available or MLX's
    device is not the CPU.
    """
    return whole(accelerating(model, mode, fused=fused, kv_dtype=kv_dtype))


def accelerating(
    model: Module,
    mode: ops.Mode = "exact",
    *,
    fused: bool = True,
    kv_dtype: mx.Dtype | None = None,
) -> Slices[Report]:
    """`accelerate` in slices of about a layer each."""
    native = _load.require()
    if mx.default_device() != mx.Device(mx.cpu):
        raise RuntimeError("native kernels serve MLX's CPU backend only")
    report = Report(native.isa(), mode)
    keep = _read_by_name(model)
    # Fused layers first: they pack q, k and v together, and the single layers share that memory.
    if fused:
        report.fused = yield from fuse(model, mode, _pack_into, keep, kv_dtype)
    _unshare(model)
    for path, module in model.named_modules():
        if _move(path, module, mode, keep, report):
            yield
    report.row_mask = any(getattr(type(m), "_native_attention", False) for m in model.modules())
    report.every_product = all(map(_is_covered, model.modules()))
    seen: set[int] = set()
    for _, module in model.named_modules():
        for packed in (module.__dict__.get("_packed"), module.__dict__.get("_packed_back")):
            if packed is not None and id(packed) not in seen:
                seen.add(id(packed))
                report.packed_bytes += packed.nbytes
    return report


def _unshare(model: Module) -> None:
    """Give the model its own of what moves without weights: mlx-lm has one activation for all experts of
    all models, as a default argument."""
    for _, parent in model.named_modules():
        for name, child in parent.children().items():
            if isinstance(child, Module) and not child and _bound(type(child)):
                parent[name] = copy.copy(child)


def _move(path: str, module: Module, mode: ops.Mode, keep: set[str], report: Report) -> bool:
    """Returns whether there was something to pack, which takes a while."""
    cls: type = type(module)
    target: type | None = None
    worked = False
    if cls in _LINEARS:
        if "_packed" not in module.__dict__:
            packed = pack(module)
            if packed is None:
                report.left.append(path)
                return False
            if cls in _HEADS:
                _pack_heads(module)
            _pack_into(module, packed, path.rpartition(".")[2] in keep)
            worked = True
        module._mode = mode
        target = _LINEARS[cls]
    elif cls is RMSNorm:
        module._native_weight = module.weight.astype(mx.float32)
        target = layers.NativeRMSNorm
    elif cls in GEMMA_NORMS:
        module._native_weight = 1.0 + module.weight.astype(mx.float32)
        target = _subclass(cls, {"__call__": layers.NativeRMSNorm.__call__})
    elif cls in layers.NATIVE_ROPES:
        module._table = layers.rope_table(module)
        target = layers.NATIVE_ROPES[cls]
    elif cls in latent.FAMILIES:
        target = _subclass(cls, latent.methods(cls))
    else:
        target = _bound(cls)
    if target is not None:
        module.__class__ = target
        report.replaced[cls.__name__] = report.replaced.get(cls.__name__, 0) + 1
    return worked


NATIVE_LAYERS = (
    layers.NativeQuantizedLinear,
    layers.NativeLinear,
    layers.NativeQuantizedEmbedding,
    layers.NativeEmbedding,
    layers.NativeQuantizedSwitchLinear,
    layers.NativeSwitchLinear,
    layers.NativeQuantizedMultiLinear,
    layers.NativeMultiLinear,
    layers.NativeRMSNorm,
    *layers.NATIVE_ROPES.values(),
)

_LINEARS: dict[type, type] = {
    QuantizedLinear: layers.NativeQuantizedLinear,
    Linear: layers.NativeLinear,
    QuantizedEmbedding: layers.NativeQuantizedEmbedding,
    Embedding: layers.NativeEmbedding,
    QuantizedSwitchLinear: layers.NativeQuantizedSwitchLinear,
    SwitchLinear: layers.NativeSwitchLinear,
    QuantizedMultiLinear: layers.NativeQuantizedMultiLinear,
    MultiLinear: layers.NativeMultiLinear,
}

_HEADS = (MultiLinear, QuantizedMultiLinear)
_STACKED = (SwitchLinear, QuantizedSwitchLinear, *_HEADS)
"""A matrix for each expert or head."""


def pack(module: Module) -> ops.Packed | None:
    """A linear, expert or embedding layer's weights packed, or None for a form that no kernel takes."""
    weight = module.weight
    if isinstance(module, _STACKED) and weight.shape[1] % 16:
        return None
    if isinstance(module, _HEADS) and _inputs(module) % 16:
        return None
    if "scales" in module:
        if layers.quantisation(module) is None:
            return None
        biases = module.get("biases")
        return ops.pack_quantized(
            weight.flatten(0, -2),
            module.scales.flatten(0, -2),
            None if biases is None else biases.flatten(0, -2),
            module.group_size,
            module.bits,
        )
    if weight.dtype not in (mx.float32, mx.bfloat16, mx.float16):
        return None
    return ops.pack_dense(weight.flatten(0, -2))


def _pack_into(module: Module, packed: ops.Packed, keep: bool = False) -> None:
    """Give the layer its packed weights and take its own away."""
    if isinstance(module, _STACKED):
        module._outputs = module.weight.shape[1]
    dtype = (module.scales if "scales" in module else module.weight).dtype
    module._dtype = dtype if mx.issubdtype(dtype, mx.floating) else mx.float32
    object.__setattr__(module, "_packed", packed)
    if not keep:
        for name in ("weight", "scales", "biases"):
            module.pop(name, None)


def _inputs(module: Module) -> int:
    if "scales" in module:
        return int(module.scales.shape[-1] * module.group_size)
    return int(module.weight.shape[-1])


def _pack_heads(module: Module) -> None:
    """The matrices transposed, for what is multiplied from the other side. Groups lie along the inputs, so
    quantised ones become float32: a few bytes of a model, and the values are the same."""
    weight = module.weight
    if "scales" in module:
        weight = mx.dequantize(
            weight,
            module.scales,
            module.get("biases"),
            module.group_size,
            module.bits,
            module.mode,
            dtype=mx.float32,
        )
    module._inputs = weight.shape[2]
    back = ops.pack_dense(weight.swapaxes(1, 2).flatten(0, 1))
    object.__setattr__(module, "_packed_back", back)


def _sources(model: Module) -> list[str]:
    names = {type(m).__module__ for _, m in model.named_modules()}
    return [
        inspect.getsource(sys.modules[name])
        for name in sorted(names)
        if name.startswith("mlx_lm.models.") and name != "mlx_lm.models.switch_layers"
    ]


def _read_by_name(model: Module) -> set[str]:
    """Names of layers whose arrays some model file reads itself."""
    return {
        match.group(1)
        for source in _sources(model)
        for line in source.splitlines()
        if '"' not in line  # a quoted name is a key in a checkpoint
        for match in _READS_WEIGHTS.finditer(line)
    }


def _is_covered(module: Module) -> bool:
    """The module has no arrays of its own, or a kernel works on them, or row by row they are added
    and scaled."""
    if isinstance(module, (*NATIVE_LAYERS, *GEMMA_NORMS, LayerNorm)):
        return True
    return not any(isinstance(v, mx.array) for k, v in module.items() if not k.startswith("_"))


def _gated(gate: mx.array, x: mx.array) -> mx.array:
    return ops.gated(gate, x, "silu")


_GLOBALS: dict[str, Any] = {
    "scaled_dot_product_attention": slab.scaled_dot_product_attention,
    "swiglu": _gated,
}
"""Names that model files import and call; bound to ours in copies of their methods."""

_subclasses: dict[tuple[type, bool], type] = {}


def _subclass(cls: type, methods: dict[str, Any]) -> type:
    key = (cls, "__call__" in methods)
    if key not in _subclasses:
        space = {"__module__": cls.__module__, **methods}
        _subclasses[key] = type(f"Native{cls.__name__}", (cls,), space)
    return _subclasses[key]


def _bound(cls: type) -> type | None:
    """A subclass whose methods see our functions under mlx-lm's names; None if no method uses them."""
    methods: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        for name, member in vars(base).items():
            if not isinstance(member, types.FunctionType) or not base.__module__.startswith(
                "mlx_lm."
            ):
                continue
            names = [
                n
                for n in _GLOBALS
                if n in member.__code__.co_names and callable(member.__globals__.get(n))
            ]
            if names:
                scope = {**member.__globals__, **{n: _GLOBALS[n] for n in names}}
                copy = types.FunctionType(
                    member.__code__, scope, name, member.__defaults__, member.__closure__
                )
                copy.__kwdefaults__ = member.__kwdefaults__
                methods[name] = copy
                if "scaled_dot_product_attention" in names:
                    methods["_native_attention"] = True
            else:  # overridden by a method that uses none of them
                methods.pop(name, None)
    return _subclass(cls, methods) if methods else None
