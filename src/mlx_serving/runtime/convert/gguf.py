"""A GGUF file → an MLX model folder, in bounded memory, visible only once it is whole."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mlx_serving.runtime.convert import arch, gguf_tokenizer
from mlx_serving.runtime.convert.folder import check_space, publish
from mlx_serving.runtime.convert.gguf_file import GGUFFile, corrupt, read_gguf
from mlx_serving.runtime.convert.repack import (
    GROUP_SIZE,
    KEPT_BITS,
    FloatType,
    from_float32,
    repack,
    to_float32,
)
from mlx_serving.runtime.convert.safetensors_file import Entry, SafetensorsWriter

CHUNK_ELEMENTS = 1 << 22
_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
Report = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Quantize:
    """What `mx.quantize` (affine) is asked for where the file's own type cannot be kept."""

    bits: int
    group_size: int


@dataclass(frozen=True, slots=True)
class Options:
    """`dtype` auto: see `_float_type`. An explicit bfloat16 rounds the scales of kept tensors too;
    `quantize` leaves kept tensors as they are, so that nothing is quantised twice."""

    quantize: Quantize | None = None
    dtype: FloatType | Literal["auto"] = "auto"


@dataclass(frozen=True, slots=True)
class Target:
    """One parameter and the form it takes: kept as it is (bits, group 32), quantised, or floats."""

    parameter: arch.Parameter
    form: Literal["kept", "quantized", "float"]
    bits: int
    group_size: int
    dtype: FloatType

    def entries(self) -> list[Entry]:
        name, shape = self.parameter.name, self.parameter.tensor.shape
        if self.form == "float":
            return [Entry(name, _CODES[self.dtype], shape)]
        rows, columns = shape
        stem, groups = name.removesuffix(".weight"), columns // self.group_size
        code = _CODES[self.dtype]
        return [
            Entry(name, "U32", (rows, columns * self.bits // 32)),
            Entry(f"{stem}.scales", code, (rows, groups)),
            Entry(f"{stem}.biases", code, (rows, groups)),
        ]


def convert_gguf(
    source: Path,
    folder: Path,
    options: Options,
    start: Callable[[str, int], None],
    advance: Report,
    job: Sequence[str] = (),
) -> None:
    """Write `folder`: config, weights, tokenizer, chat template, generation defaults.

    Raises ModelBroken with code corrupt_file, unsupported_architecture, unsupported_tokenizer or
    no_space. A folder that appears meanwhile (another process was faster) is left as it is. `job`:
    the arguments that ask for this conversion again, for the folder's manifest.
    """
    gguf = read_gguf(source)
    config = arch.model_config(gguf)
    targets = plan(gguf, config, options)
    config |= _quantization(targets) | {"torch_dtype": targets[0].dtype}
    tokenizer = gguf_tokenizer.build(gguf)
    entries = [entry for target in targets for entry in target.entries()]
    total = sum(entry.nbytes for entry in entries)
    folder.parent.mkdir(parents=True, exist_ok=True)
    check_space(folder.parent, total)
    start(f"convert {source.name}", total)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        temporary.chmod(0o755)
        with SafetensorsWriter(temporary / "model.safetensors", entries) as writer:
            for target in targets:
                _write(gguf, target, writer, advance)
        files = {
            "config.json": config | tokenizer.special_ids,
            "tokenizer_config.json": tokenizer.config,
            "generation_config.json": tokenizer.generation_config,
        }
        for name, content in files.items():
            (temporary / name).write_text(
                json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8"
            )
        tokenizer.tokenizer.save(str(temporary / "tokenizer.json"))
        publish(temporary, folder, job)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def plan(gguf: GGUFFile, config: arch.Json, options: Options) -> list[Target]:
    """Which form each parameter takes; reads no tensor data."""
    parameters = arch.parameters(gguf, config)
    dtype = _float_type(config, parameters) if options.dtype == "auto" else options.dtype
    return [_target(parameter, dtype, options.quantize) for parameter in parameters]


def _target(parameter: arch.Parameter, dtype: FloatType, quantize: Quantize | None) -> Target:
    shape, kind = parameter.tensor.shape, parameter.tensor.kind
    if len(shape) == 2 and kind in KEPT_BITS:
        return Target(parameter, "kept", KEPT_BITS[kind], GROUP_SIZE, dtype)
    if quantize and len(shape) == 2 and shape[1] % quantize.group_size == 0:
        return Target(parameter, "quantized", quantize.bits, quantize.group_size, dtype)
    return Target(parameter, "float", 0, 0, dtype)


def _float_type(config: arch.Json, parameters: list[arch.Parameter]) -> FloatType:
    """One type for all, since mixed ones would be computed in float32. Kept scales are float16 and
    only float16 or float32 hold them exactly; Gemma's activations want bfloat16's range."""
    kinds = {p.tensor.kind for p in parameters if len(p.tensor.shape) == 2}
    if kinds & KEPT_BITS.keys():
        return "float16"
    if "BF16" in {kind.name for kind in kinds} or config["model_type"].startswith("gemma"):
        return "bfloat16"
    return "float32" if {kind.name for kind in kinds} == {"F32"} else "float16"


def _quantization(targets: list[Target]) -> dict[str, Any]:
    """The commonest form as the default, every other module by name."""
    packed = [target for target in targets if target.form != "float"]
    if not packed:
        return {}
    forms = Counter((target.group_size, target.bits) for target in packed)
    default = forms.most_common(1)[0][0]
    entry: dict[str, Any] = {"group_size": default[0], "bits": default[1], "mode": "affine"}
    for target in packed:
        if (target.group_size, target.bits) != default:
            module = target.parameter.name.removesuffix(".weight")
            entry[module] = {"group_size": target.group_size, "bits": target.bits}
    return {"quantization": entry, "quantization_config": entry}


def _write(gguf: GGUFFile, target: Target, writer: SafetensorsWriter, advance: Report) -> None:
    parameter = target.parameter
    names = [entry.name for entry in target.entries()]
    for rows in _row_chunks(parameter):
        try:
            values = _converted(target, rows)
        except (OverflowError, NotImplementedError) as e:
            kind = parameter.tensor.kind.name
            raise corrupt(gguf.path, f"tensor {parameter.tensor.name} ({kind}): {e}") from e
        for name, part in zip(names, values, strict=True):
            writer.append(name, part)
            advance(part.nbytes)


def _row_chunks(parameter: arch.Parameter) -> Iterator[npt.NDArray[np.uint8]]:
    rows, columns = parameter.tensor.rows, parameter.tensor.shape[-1]
    step = max(1, CHUNK_ELEMENTS // columns)
    for begin in range(0, len(rows), step):
        if parameter.row_order is None or len(parameter.tensor.shape) == 1:
            yield rows[begin : begin + step]
        else:
            yield rows[parameter.row_order[begin : begin + step]]


def _converted(target: Target, rows: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.generic], ...]:
    parameter = target.parameter
    if target.form == "kept":
        weight, scales, biases = repack(parameter.tensor.kind, rows)
        return weight, _rounded(scales, target.dtype), _rounded(biases, target.dtype)
    values = to_float32(parameter.tensor.kind, rows)
    if parameter.row_order is not None and len(parameter.tensor.shape) == 1:
        values = values[:, parameter.row_order]
    if parameter.offset:
        values = values + np.float32(parameter.offset)
    if target.form == "float":
        return (from_float32(values, target.dtype),)
    return _quantized(values, target)


def _rounded(scales: npt.NDArray[np.float16], dtype: FloatType) -> npt.NDArray[np.generic]:
    return scales if dtype == "float16" else from_float32(scales.astype(np.float32), dtype)


def _quantized(
    values: npt.NDArray[np.float32], target: Target
) -> tuple[npt.NDArray[np.generic], ...]:
    # Loaded only for a job that re-quantises: everything else is numpy.
    import mlx.core as mx

    weight, scales, biases = mx.quantize(
        mx.array(values), group_size=target.group_size, bits=target.bits
    )
    return (
        np.array(weight),
        from_float32(np.array(scales), target.dtype),
        from_float32(np.array(biases), target.dtype),
    )
