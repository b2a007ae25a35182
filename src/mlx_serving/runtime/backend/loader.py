"""From a model folder to a runner. Imports MLX only for a model that needs it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from mlx_serving.errors import ModelBroken
from mlx_serving.runtime import blas
from mlx_serving.runtime.backend.model import LoadedModel, OnPhase
from mlx_serving.runtime.slices import Slices, whole
from mlx_serving.types import ENCODERS
from mlx_serving.worker.wire import ModelOptions

log = logging.getLogger(__name__)

__all__ = ["LoadedModel", "OnPhase", "check_weights", "load", "loading"]


def load(model_id: str, path: Path, options: ModelOptions, on_phase: OnPhase) -> LoadedModel:
    """`loading` without interruption."""
    return whole(loading(model_id, path, options, on_phase))


def loading(
    model_id: str, path: Path, options: ModelOptions, on_phase: OnPhase
) -> Slices[LoadedModel]:
    """Load an MLX model folder (`config.json`, `model*.safetensors`) and warm it up, in slices.

    Run it, and then the runner, on one thread. Raises ModelBroken, whose message names the file or
    the setting at fault.
    """
    on_phase("loading", model_id)
    config = read_json(path / "config.json", required=True)
    if config.get("model_type") == "scripted":
        from mlx_serving.runtime.backend import scripted

        return (yield from scripted.load(model_id, path, config, options))
    if not isinstance(config.get("model_type"), str):
        raise ModelBroken(f"{path / 'config.json'} has no model_type")
    check_weights(path)
    log.info("%s", blas.preload())
    _check_backend()
    if config["model_type"] in ENCODERS:
        from mlx_serving.runtime.backend import encoder_model

        return (yield from encoder_model.load(model_id, path, config, options, on_phase))
    from mlx_serving.runtime.backend import mlx_model

    return (yield from mlx_model.load(model_id, path, config, options, on_phase))


def _check_backend() -> None:
    """Raises ModelBroken where MLX, or the library behind it, is not installed."""
    try:
        import mlx.core  # noqa: F401
    except ImportError as error:
        raise ModelBroken(
            f"MLX cannot be used ({error}): 'mlx-serving doctor' says what to install"
        ) from error


def read_json(path: Path, *, required: bool = False) -> dict[str, Any]:
    """A JSON object from a file; empty if the file is not there and not `required`."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        if required:
            raise ModelBroken(f"{path} is missing: not an MLX model folder") from None
        return {}
    except (OSError, ValueError) as e:
        raise ModelBroken(f"{path} cannot be read: {e}") from e
    if not isinstance(value, dict):
        raise ModelBroken(f"{path} is not a JSON object")
    return value


def failed(what: str, error: Exception) -> ModelBroken:
    """mlx-lm and the model files raise whatever a wrong config or tensor leads to."""
    return ModelBroken(f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:400]}")


def check_weights(path: Path) -> int:
    """Bytes of the weights; every file whole. Reads headers only.

    Raises ModelBroken if a file is missing, not safetensors, or cut short.
    """
    files = sorted(path.glob("model*.safetensors"))
    listed = read_json(path / "model.safetensors.index.json").get("weight_map", {})
    missing = sorted(set(listed.values()) - {f.name for f in files})
    if missing:
        raise ModelBroken(f"{path} lacks {', '.join(missing)}, which its index lists")
    if not files:
        raise ModelBroken(f"{path} has no model*.safetensors")
    return sum(_check_safetensors(f) for f in files)


def _check_safetensors(file: Path) -> int:
    size = file.stat().st_size
    with file.open("rb") as f:
        header_bytes = int.from_bytes(f.read(8), "little")
        if size < 8 or header_bytes > size - 8:
            raise ModelBroken(f"{file} is truncated or not safetensors ({size} bytes)")
        try:
            header = json.loads(f.read(header_bytes))
            ends = [t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ModelBroken(f"{file} is not safetensors: {e}") from e
    data_bytes: int = max(ends, default=0)
    expected = 8 + header_bytes + data_bytes
    if size < expected:
        raise ModelBroken(f"{file} is truncated: {size} of {expected} bytes")
    return data_bytes
