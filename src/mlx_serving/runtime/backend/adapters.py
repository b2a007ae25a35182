"""LoRA and DoRA adapters beside a loaded model, whose own weights stay as they are.

A layer that an adapter changes becomes a subclass of itself, in place, that adds what the adapters of
the present forward pass add; in a pass without any it computes what it always did. Which adapters
those are is said by whoever builds the pass (`Adapters.on`): MLX's graphs are built layer by layer on
one thread, so it is known when each layer is called.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.quantized import QuantizedLinear

from mlx_serving.adapter_folder import (
    CONFIG_FILE,
    AdapterSettings,
    BadAdapter,
    LayerTensors,
    layers,
    read_settings,
)
from mlx_serving.errors import ModelBroken
from mlx_serving.runtime.backend.identity import adapter_identity
from mlx_serving.runtime.backend.model import LoadedAdapter, adapter_info
from mlx_serving.runtime.slices import Slices
from mlx_serving.types import ModelInfo

Change = Callable[[mx.array, mx.array], mx.array]
"""From a layer's input and its own output to the output with the adapter's part."""
LAYERS_A_SLICE = 16


@dataclass(slots=True)
class Adapter:
    tag: str
    changes: dict[str, Change] = field(default_factory=dict)
    """By the layer's path."""
    nbytes: int = 0
    mixes: bool = False
    """Rows of it and of others can be lines of one forward pass: each of its layers sees the batch's lines
    as they are."""


class Mix:
    """Several adapters in one forward pass over `count` lines, each on its own; other lines have none."""

    def __init__(self, parts: Sequence[tuple[Adapter, Sequence[int]]], count: int) -> None:
        order = [line for _, lines in parts for line in lines]
        self.spans: list[tuple[Adapter, int, int]] = []
        begin = 0
        for adapter, lines in parts:
            self.spans.append((adapter, begin, begin + len(lines)))
            begin += len(lines)
        self.used = begin
        order += sorted(set(range(count)) - set(order))
        back = sorted(range(count), key=order.__getitem__)
        self._order, self._back = mx.array(order), mx.array(back)

    def change(self, layer: str, x: mx.array, y: mx.array) -> mx.array:
        x, y = x[self._order], y[self._order]
        parts = [
            change(x[begin:end], y[begin:end])
            if (change := adapter.changes.get(layer)) is not None
            else y[begin:end]
            for adapter, begin, end in self.spans
        ]
        if self.used < y.shape[0]:
            parts.append(y[self.used :])
        return mx.concatenate(parts)[self._back]


class Adapters:
    """Implements `model.AdapterHost`.

    Args:
        model: as the runner has it.
        native: the native kernels run its linear layers, and are to run the adapters' too.
        fused: the fused decoder, which has to stand aside where layers are changed.
    """

    def __init__(self, model: Module, *, native: bool = False, fused: Any = None) -> None:
        self._model = model
        self._native = native
        self._fused = fused
        self._loaded: dict[str, Adapter] = {}
        self._changed: dict[str, type] = {}
        """The class that each changed layer had."""
        self._active: Adapter | Mix | None = None
        self._reached: dict[str, int] = {}
        """Layers that a trial has called, and how many lines they saw."""

    def __getitem__(self, tag: str) -> Adapter:
        return self._loaded[tag]

    @contextmanager
    def on(self, active: Adapter | Mix) -> Iterator[None]:
        """Forward passes that are built inside have these adapters; one alone has all lines."""
        self._active = active
        if self._fused is not None:
            self._fused.off = True
        try:
            yield
        finally:
            self._active = None
            if self._fused is not None:
                self._fused.off = False

    def load(self, model_id: str, path: Path, base: ModelInfo) -> Slices[LoadedAdapter]:
        began_s = time.monotonic()
        try:
            settings = read_settings(path)
            adapter = yield from self._read(model_id, path, settings, Path(base.path))
        except BadAdapter as bad:
            raise ModelBroken(f"the adapter in {path} cannot be loaded: {bad}") from bad
        self._loaded[adapter.tag] = adapter
        try:
            yield from self._try(adapter, settings)
        except BaseException as error:
            self.unload(adapter.tag)
            if isinstance(error, BadAdapter):
                raise ModelBroken(f"the adapter in {path} cannot be loaded: {error}") from error
            raise
        load_s = time.monotonic() - began_s
        info = adapter_info(base, model_id, path, adapter.nbytes, load_s)
        return LoadedAdapter(info, adapter.tag)

    def unload(self, tag: str) -> None:
        gone = self._loaded.pop(tag, None)
        kept = {layer for adapter in self._loaded.values() for layer in adapter.changes}
        modules = dict(self._model.named_modules())
        for layer in set(gone.changes if gone else ()) - kept:
            if layer in self._changed:
                modules[layer].__class__ = self._changed.pop(layer)

    def _read(
        self, model_id: str, path: Path, settings: AdapterSettings, base: Path
    ) -> Slices[Adapter]:
        """With what it changes, read and packed. Raises BadAdapter."""
        weights = path / settings.file
        try:
            tensors: Any = mx.load(str(weights))
        except Exception as error:
            kind = "bad_file" if weights.is_file() else "missing"
            raise BadAdapter(settings.file, kind, f"cannot be read ({error})") from error  # type: ignore[arg-type]
        adapter = Adapter(f"{model_id}@{adapter_identity(weights, path / CONFIG_FILE)}")
        modules = dict(self._model.named_modules())
        bare = _Bare(base) if settings.dora else None
        for i, (name, names) in enumerate(layers(settings, tensors).items()):
            layer = _find(name, modules, settings.file)
            low = _Low.of(settings, name, names, tensors, modules[layer])
            if bare is None:
                change, nbytes = _lora(low, self._native)
            else:
                change, nbytes = _dora(low, bare.weight(layer), modules[layer], self._native)
            adapter.changes[layer] = change
            adapter.nbytes += nbytes
            if i % LAYERS_A_SLICE == 0:
                yield
        return adapter

    def _try(self, adapter: Adapter, settings: AdapterSettings) -> Slices[None]:
        """Change the layers, and see in two forward passes, which nobody computes, that each is called:
        some model files read a layer's weights without calling it. Raises BadAdapter."""
        modules = dict(self._model.named_modules())
        for layer in adapter.changes:
            if layer not in self._changed:
                module = modules[layer]
                self._changed[layer] = type(module)
                object.__setattr__(module, "_changes", (self, layer))
                module.__class__ = _changing(type(module))
        yield
        self._trial(adapter, (1, 2))
        missed = sorted(adapter.changes.keys() - self._reached.keys())
        if missed:
            detail = f"the model does not call {missed[0]}, but reads its weights"
            raise BadAdapter(settings.file, "unsupported", detail)
        self._trial(adapter, (2, 1))
        adapter.mixes = all(self._reached.get(layer) == 2 for layer in adapter.changes)

    def _trial(self, adapter: Adapter, shape: tuple[int, int]) -> None:
        from mlx_lm.models.cache import make_prompt_cache

        self._reached = {}
        with self.on(adapter):
            model: Any = self._model
            model(mx.zeros(shape, mx.int32), cache=make_prompt_cache(model))

    def change(self, layer: str, x: mx.array, y: mx.array) -> mx.array:
        """A layer's output `y` with what the active adapters make of its input `x`."""
        match self._active:
            case None:
                return y
            case Mix() as mix:
                return mix.change(layer, x, y)
            case adapter:
                self._reached[layer] = x.shape[0]
                change = adapter.changes.get(layer)
                return y if change is None else change(x, y)


_classes: dict[type, type] = {}


def _changing(cls: type) -> type:
    """A subclass of a layer's class that lets the adapters change its output."""

    def call(self: Any, x: mx.array) -> mx.array:
        y: mx.array = cls.__call__(self, x)
        adapters, layer = self._changes
        changed: mx.array = adapters.change(layer, x, y)
        return changed

    if cls not in _classes:
        space = {"__call__": call, "__module__": cls.__module__}
        _classes[cls] = type(f"Changing{cls.__name__}", (cls,), space)
    return _classes[cls]


def _find(name: str, modules: dict[str, Module], file: str) -> str:
    """The path of the linear layer that an adapter calls so; it may leave out what the model's own file
    puts before it. Raises BadAdapter."""
    paths = [name] if name in modules else [p for p in modules if p.endswith(f".{name}")]
    if len(paths) != 1:
        raise BadAdapter(file, "mismatch", f"the model has no layer {name}")
    (path,) = paths
    if not isinstance(modules[path], Linear | QuantizedLinear):
        kind = type(modules[path]).__name__
        raise BadAdapter(file, "unsupported", f"{name} is no linear layer but {kind}")
    return path


@dataclass(frozen=True, slots=True)
class _Low:
    """One layer's low-rank product, float32: a `[in, rank]`, b `[rank, out]` times its scale, m `[out]`."""

    a: mx.array
    b: mx.array
    m: mx.array | None

    @classmethod
    def of(
        cls,
        settings: AdapterSettings,
        name: str,
        names: LayerTensors,
        tensors: dict[str, mx.array],
        module: Module,
    ) -> _Low:
        """Raises BadAdapter if the shapes are not the layer's."""
        a, b = tensors[names.a], tensors[names.b]
        m = None if names.m is None else tensors[names.m]
        if a.ndim != 2 or b.ndim != 2:
            raise BadAdapter(
                settings.file, "unsupported", f"{name} is of experts, not of one layer"
            )
        if settings.peft:
            a, b = a.T, b.T
        inputs, outputs = _size(module)
        shapes = a.shape[0], b.shape[1], a.shape[1], None if m is None else m.size
        if shapes != (inputs, outputs, b.shape[0], None if m is None else outputs):
            found = f"{a.shape[0]} to {b.shape[1]} by rank {a.shape[1]}"
            detail = f"{name} is for a layer of {found}; the model's is of {inputs} to {outputs}"
            raise BadAdapter(settings.file, "mismatch", detail)
        scale = settings.scale(name, a.shape[1])
        wide = None if m is None else m.astype(mx.float32).flatten()
        return cls(a.astype(mx.float32), scale * b.astype(mx.float32), wide)

    def product(self, native: bool) -> tuple[Callable[[mx.array], mx.array], int]:
        """`x @ a @ b` in float32, and the bytes that it holds. A line's result does not depend on the lines
        beside it."""
        if native:
            from mlx_serving.runtime.native import ops

            first, second = ops.pack_dense(self.a.T), ops.pack_dense(self.b.T)

            def packed(x: mx.array) -> mx.array:
                return ops.linear(ops.linear(x.astype(mx.float32), first), second)

            return packed, first.nbytes + second.nbytes

        # A batch of matrices: with one matrix MLX would make one product of all lines, whose rounding
        # depends on how many there are.
        a, b = self.a[None], self.b[None]
        mx.eval(a, b)

        def plain(x: mx.array) -> mx.array:
            wide = x.astype(mx.float32)
            return wide @ a @ b if x.ndim > 2 else wide @ a[0] @ b[0]

        return plain, a.nbytes + b.nbytes


def _size(module: Any) -> tuple[int, int]:
    """A linear layer's inputs and outputs."""
    packed = module.__dict__.get("_packed")
    if packed is not None:
        return packed.k, packed.n
    outputs, inputs = module.weight.shape
    if "scales" in module:
        inputs = module.scales.shape[-1] * module.group_size
    return inputs, outputs


def _lora(low: _Low, native: bool) -> tuple[Change, int]:
    product, nbytes = low.product(native)

    def change(x: mx.array, y: mx.array) -> mx.array:
        return y + product(x).astype(y.dtype)

    return change, nbytes


def _dora(low: _Low, weight: mx.array, module: Any, native: bool) -> tuple[Change, int]:
    """`weight`: the layer's own, float32 `[out, in]`."""
    assert low.m is not None
    product, nbytes = low.product(native)
    factor = low.m / mx.linalg.norm(weight + (low.a @ low.b).T, axis=1)
    mx.eval(factor)
    bias = module.get("bias")

    def change(x: mx.array, y: mx.array) -> mx.array:
        wide = y.astype(mx.float32) if bias is None else y.astype(mx.float32) - bias
        wide = factor * (wide + product(x))
        return (wide if bias is None else wide + bias).astype(y.dtype)

    return change, nbytes + factor.nbytes


class _Bare:
    """The model's weights as its files have them: kernels keep them in a form of their own."""

    def __init__(self, path: Path) -> None:
        from mlx_lm.utils import load_model

        model, _ = load_model(path, lazy=True)
        self._modules: dict[str, Any] = dict(model.named_modules())

    def weight(self, layer: str) -> mx.array:
        """Dequantised, float32 `[out, in]`; not computed yet."""
        module = self._modules[layer]
        weight: mx.array = module.weight
        if "scales" in module:
            weight = mx.dequantize(
                weight,
                module.scales,
                module.get("biases"),
                group_size=module.group_size,
                bits=module.bits,
                mode=module.mode,
            )
        return weight.astype(mx.float32)
