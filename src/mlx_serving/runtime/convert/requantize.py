"""An MLX (or Hugging Face) model folder → another one: quantised, dequantised, or of another type.

mlx-lm decides which modules are quantised and how; the weights are computed and written a shard at a
time, so that a conversion holds about one shard besides what it reads.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten
from mlx_lm.convert import mixed_quant_predicate_builder
from mlx_lm.utils import dequantize_model, load_model, make_shards, quantize_model, save_config

from mlx_serving.errors import ModelBroken
from mlx_serving.runtime.backend.weights import cast
from mlx_serving.runtime.convert.folder import check_space, publish
from mlx_serving.worker.jobwire import MANIFEST

SHARD_GB = 2
_NOT_COPIED = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf", ".py", ".onnx")

Mode = Literal["affine", "mxfp4", "nvfp4", "mxfp8"]


@dataclass(frozen=True, slots=True)
class Options:
    """In this order: dequantise, cast, quantise. `bits` and `group_size` None: the mode's own.

    `recipe` is one of mlx-lm's mixed ones: more bits for the layers that need them.
    """

    quantize: bool = False
    bits: int | None = None
    group_size: int | None = None
    mode: Mode = "affine"
    recipe: str | None = None
    dequantize: bool = False
    dtype: str | None = None


def requantize(
    source: Path,
    folder: Path,
    options: Options,
    start: Callable[[str, int], None],
    advance: Callable[[int], None],
    job: list[str],
) -> None:
    """Write `folder`. Raises ModelBroken with code already_quantised, unsupported_architecture,
    unsupported_recipe or no_space; OSError where a disk refuses."""
    weights, config = _converted(source, options)
    total = sum(weight.nbytes for weight in weights.values())
    folder.parent.mkdir(parents=True, exist_ok=True)
    check_space(folder.parent, total)
    start(f"convert {source.name}", total)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        temporary.chmod(0o755)
        _write(weights, temporary, advance)
        save_config(config, temporary / "config.json")
        _copy_the_rest(source, temporary)
        publish(temporary, folder, job)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _converted(source: Path, options: Options) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """The wanted weights, nothing of them computed yet, and the config that fits them."""
    try:
        model, config = load_model(source, lazy=True)
    except Exception as e:  # whatever a wrong config or tensor leads to
        raise ModelBroken(f"{source}: {e}", code="unsupported_architecture") from e
    if options.dequantize:
        config.pop("quantization", None)
        config.pop("quantization_config", None)
        model = dequantize_model(model)
    if options.quantize and config.get("quantization"):
        raise ModelBroken(
            f"{source.name} is quantised already; start from its floats, or add --dequantize to "
            "quantise what is left of them",
            code="already_quantised",
        )
    if options.dtype:
        cast(model, getattr(mx, options.dtype))
        config["torch_dtype"] = options.dtype
    if options.quantize:
        model, config = _quantized(model, config, options)
    flat: Any = tree_flatten(model.parameters())
    return dict(flat), config


def _quantized(model: Module, config: dict[str, Any], options: Options) -> tuple[Module, Any]:
    predicate: Any = None
    if options.recipe:
        try:
            predicate = mixed_quant_predicate_builder(
                options.recipe, model, options.group_size or 64
            )
        except ValueError as e:
            raise ModelBroken(f"recipe {options.recipe}: {e}", code="unsupported_recipe") from e
    return quantize_model(
        model,
        config,
        options.group_size,
        options.bits,
        mode=options.mode,
        quant_predicate=predicate,
    )


def _write(weights: dict[str, mx.array], folder: Path, advance: Callable[[int], None]) -> None:
    """Compute and write shard after shard, each let go of before the next."""
    shards = make_shards(weights, SHARD_GB)
    total = sum(weight.nbytes for weight in weights.values())
    weights.clear()
    index: dict[str, str] = {}
    for i in range(len(shards)):
        shard, shards[i] = shards[i], {}
        name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        if len(shards) == 1:
            name = "model.safetensors"
        for array in shard.values():
            mx.eval(array)
            advance(array.nbytes)
        mx.save_safetensors(str(folder / name), shard, metadata={"format": "mlx"})
        index |= dict.fromkeys(shard, name)
        del shard
        mx.clear_cache()
    listed = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(listed, indent=2))


def _copy_the_rest(source: Path, folder: Path) -> None:
    """Tokenizer, chat template, generation defaults, licence; never code or other weights."""
    for file in source.iterdir():
        skip = file.name in ("config.json", MANIFEST) or file.name.endswith(_NOT_COPIED)
        if file.is_file() and not skip and not file.name.startswith("."):
            shutil.copyfile(file, folder / file.name)
