"""Whether the native CPU kernels run a model's layers, and what follows from it."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from mlx.nn.layers.base import Module

from mlx_serving.errors import ModelBroken
from mlx_serving.runtime.backend.arch import make_store
from mlx_serving.runtime.backend.kv import KVStore
from mlx_serving.runtime.backend.kv_layers import KVLayer, MakeKVLayer
from mlx_serving.runtime.backend.quantized_kv import AS_COMPUTED, KVFormat, QuantizedLayer
from mlx_serving.runtime.backend.sampler import Sampler
from mlx_serving.runtime.backend.space import Space
from mlx_serving.runtime.slices import Slices

_NATIVE = "mlx_serving.runtime.native"
_INSTALL = f"{_NATIVE}.install"
_FUSED = f"{_NATIVE}.fused"
_OPS = f"{_NATIVE}.ops"
_IN_PLACE = "mlx_serving.runtime.backend.in_place"
_SAMPLER = "mlx_serving.runtime.backend.native_sampler"
_TRIAL_BUCKET = 16


@dataclass(frozen=True, slots=True)
class Kernels:
    """What runs a decoder's layers."""

    name: str = "mlx"
    """As in `ModelInfo.kernels`."""
    attention: MakeKVLayer = KVLayer
    sampler: type[Sampler] = Sampler
    in_place: bool = False
    """Attention reads KV where it lies, by row and position."""
    invariant: bool = False
    """A row's result is the same bits beside any others, and wherever its prompt was cut."""
    space: Space | None = None
    """Where slabs may lie whose rows take memory as they are written."""
    packed_bytes: int = 0
    """Memory of the weights that the kernels have repacked."""
    native: bool = False
    fused: Any = None
    """The `native.fused.FusedDecoder`, where one runs all layers at once."""


def accelerate(model: Module, mode: str, gpu: bool) -> Slices[Any]:
    """Install the native kernels if they are built and `mode` wants them: `native.install`'s report,
    or None where stock MLX runs. Raises ModelBroken if `mode` names kernels that cannot run."""
    if gpu or mode == "off":
        return None
    reason = "this installation has no native kernels"
    if importlib.util.find_spec(_INSTALL) is not None:
        native = importlib.import_module(_NATIVE)
        if native.available():
            install = importlib.import_module(_INSTALL)
            exact = "exact" if mode == "auto" else mode
            return (yield from install.accelerating(model, exact))
        reason = native.why()
    if mode != "auto":
        raise ModelBroken(f"kernels '{mode}' cannot run here ({reason}); use 'auto' or 'off'")
    return None


def decoder_kernels(
    model: Module, model_type: str, mode: str, gpu: bool, form: KVFormat | None
) -> Slices[Kernels]:
    """`accelerate`, and how a decoder's attention then keeps and reads KV."""
    plain: MakeKVLayer = KVLayer if form is None else partial(QuantizedLayer, form=form)
    report = yield from accelerate(model, mode, gpu)
    if report is None:
        return Kernels(attention=plain)
    made = Kernels(
        report.mode,
        plain,
        importlib.import_module(_SAMPLER).NativeSampler,
        space=importlib.import_module(_OPS),
        packed_bytes=report.packed_bytes,
        native=True,
        fused=importlib.import_module(_FUSED).decoder_of(model),
    )
    module = importlib.import_module(_IN_PLACE)
    in_place: MakeKVLayer = module.InPlaceLayer
    if form is not None:
        in_place = partial(module.QuantizedInPlaceLayer, form=form)
    if report.is_fused:
        # In place, since forwards of an adapter's rows go layer by layer over the same slabs.
        return replace(made, attention=in_place, in_place=True, invariant=True)
    tried: tuple[MakeKVLayer, ...] = plain, in_place
    if form is not None:
        # Layers that are compared round nothing: of two roundings of almost the same number, one may go up.
        tried = (
            partial(QuantizedLayer, form=AS_COMPUTED),
            partial(module.QuantizedInPlaceLayer, form=AS_COMPUTED),
            in_place,
        )

    def trial_store(attention: MakeKVLayer) -> KVStore:
        return make_store(
            model, model_type, 2, bucket=_TRIAL_BUCKET, exact_batch=False, attention=attention
        )

    if report.row_mask and module.attends_in_place(model, trial_store, *tried):
        return replace(made, attention=in_place, in_place=True, invariant=report.every_product)
    return made
