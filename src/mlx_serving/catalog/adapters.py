"""A served model's adapters: fetched, and their files checked, without MLX. Whether their shapes are the
model's is seen when they are loaded beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlx_serving.adapter_folder import (
    AdapterSettings,
    BadAdapter,
    layers,
    read_settings,
)
from mlx_serving.catalog import hub
from mlx_serving.catalog.fingerprint import fingerprint
from mlx_serving.catalog.home import hold, models_home
from mlx_serving.catalog.progress import Progress, Silent
from mlx_serving.catalog.resolve import HubRepo, LocalFolder, resolve
from mlx_serving.catalog.tensors import NotWhole, Tensor, read_header
from mlx_serving.config import Config
from mlx_serving.errors import MLXServingError, ModelBroken, ModelNotFound

HELD_AS_BYTES = 4
"""An adapter's numbers become float32."""


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter on disk, whole and of a kind that runs."""

    path: Path
    kind: str
    """`lora` or `dora`."""
    writer: str
    """`mlx-lm` or `peft`."""
    rank: int
    """The largest of its layers'."""
    layers: int
    held_bytes: int
    """What it will take in memory, about."""
    weights: Path

    def fingerprint(self) -> str:
        return fingerprint(self.path, self.path, (self.weights,))


def ensure_adapter(source: str, config: Config, progress: Progress | None = None) -> AdapterFiles:
    """The adapter of a folder or hub id, fetched if need be; blocks. Raises ModelBroken by cause."""
    home = models_home(config.home, os.environ)
    try:
        found = resolve(source, home)
        match found:
            case LocalFolder(path):
                pass
            case HubRepo(repo, revision):
                path = hub.pull(
                    repo,
                    revision,
                    home=home,
                    offline=config.offline,
                    progress=progress or Silent(),
                )
            case _:
                raise ModelNotFound(f"{source!r} is a model")
    except ModelNotFound as error:
        # A server whose model is not there ends; one whose adapter is not there does not.
        why = f"there is no adapter {source!r}, neither a folder nor a repository of the hub"
        raise ModelBroken(why, code="adapter_not_found") from error
    try:
        files = read_adapter(path.absolute())
    except BadAdapter as bad:
        raise refusal(path, bad) from bad
    hold(home, files.path)
    return files


def refusal(path: Path, bad: BadAdapter) -> MLXServingError:
    code = "unsupported_adapter" if bad.kind == "unsupported" else "corrupt_file"
    return ModelBroken(f"the adapter in {path} cannot be served: {bad}", code=code)


def read_adapter(path: Path) -> AdapterFiles:
    """Raises BadAdapter."""
    settings = read_settings(path)
    weights = path / settings.file
    try:
        tensors = read_header(weights)
    except NotWhole as why:
        raise BadAdapter(weights.name, why.kind, why.detail) from None
    found = layers(settings, tensors)
    ranks = [_rank(settings, tensors, names.a, names.b) for names in found.values()]
    return AdapterFiles(
        path=path,
        kind="dora" if settings.dora else "lora",
        writer="peft" if settings.peft else "mlx-lm",
        rank=max(ranks),
        layers=len(found),
        held_bytes=HELD_AS_BYTES * sum(tensor.elements for tensor in tensors.values()),
        weights=weights,
    )


def _rank(settings: AdapterSettings, tensors: Mapping[str, Tensor], a: str, b: str) -> int:
    first, second = tensors[a].shape, tensors[b].shape
    if len(first) != 2 or len(second) != 2:
        raise BadAdapter(settings.file, "unsupported", f"{a} is of experts, not of one layer")
    inner = (first[0], second[1]) if settings.peft else (first[1], second[0])
    if inner[0] != inner[1]:
        raise BadAdapter(settings.file, "mismatch", f"{a} has rank {inner[0]}, {b} {inner[1]}")
    return inner[0]
