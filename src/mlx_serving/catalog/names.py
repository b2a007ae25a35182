"""What clients call a model that was given no name of its own."""

from __future__ import annotations

from pathlib import Path

from mlx_serving.catalog.aliases import ALIASES


def default_name(spec: str) -> str:
    """An alias itself, a folder's name, a .gguf file's stem, a hub id without its revision."""
    if spec in ALIASES:
        return spec
    path = Path(spec).expanduser()
    if path.is_dir():
        return path.absolute().name
    if path.suffix.lower() == ".gguf":
        return path.stem
    return spec.partition("@")[0]
