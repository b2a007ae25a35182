"""All that a model folder's small files and headers say of it, for `list`, `show` and `health`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from mlx_serving.catalog.architectures import Modality, modalities
from mlx_serving.catalog.folder import ModelFolder, read_config, read_folder, weight_files
from mlx_serving.catalog.tensors import NotWhole, Tensor, count_parameters, read_header

_DEFAULT_GROUP = 64
_LICENCES = (
    ("Apache License", "apache-2.0"),
    ("MIT License", "mit"),
    ("LLAMA", "llama"),
    ("Gemma Terms", "gemma"),
)
"""What a LICENSE file's beginning says, and the hub's word for it."""


class File(msgspec.Struct, frozen=True):
    name: str
    size_bytes: int


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """Of one model folder. What cannot be read off broken files is None or empty."""

    folder: ModelFolder
    modalities: tuple[Modality, ...]
    parameters: int | None
    licence: str | None
    files: tuple[File, ...]

    @property
    def disk_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


def read_facts(path: Path, name: str) -> Facts:
    """Raises ModelBroken (corrupt_file) when config.json cannot be read; checks nothing else."""
    config = read_config(path)
    return Facts(
        folder=read_folder(path, name),
        modalities=modalities(config, path),
        parameters=count_in(path, config),
        licence=_licence(path),
        files=list_files(path),
    )


def list_files(path: Path) -> tuple[File, ...]:
    """Whatever the folder holds, links followed; a link that leads nowhere counts 0 bytes."""
    found = sorted(p for p in path.rglob("*") if not p.is_dir())
    return tuple(
        File(str(p.relative_to(path)), p.stat().st_size if p.exists() else 0) for p in found
    )


def count_in(path: Path, config: Mapping[str, Any]) -> int | None:
    """The numbers in a folder's weights, by their files' headers; None: they have none, or are broken."""
    tensors: dict[str, Tensor] = {}
    try:
        for shard in weight_files(path):
            tensors |= read_header(shard)
    except NotWhole:
        return None
    quantization = config.get("quantization") or config.get("quantization_config")
    table = quantization if isinstance(quantization, dict) else {}

    def group_size(module: str) -> int:
        own = table.get(module)
        found = (own if isinstance(own, dict) else table).get("group_size")
        return found if isinstance(found, int) else _DEFAULT_GROUP

    return count_parameters(tensors, group_size) if tensors else None


def _licence(path: Path) -> str | None:
    """From the model card's head, else from the beginning of a licence file."""
    card = _beginning(path / "README.md")
    if found := re.search(r"\A---\n.*?^license(?:_name)?:\s*([\w.+-]+)", card, re.S | re.M):
        return found[1]
    for file in sorted(path.glob("LICENSE*")):
        text = _beginning(file)
        return next((word for said, word in _LICENCES if said in text), file.name)
    return None


def _beginning(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(8192).decode(errors="replace")
    except OSError:
        return ""
