"""What clients call a model that was given no name of its own, and what its folder is called."""

from __future__ import annotations

import hashlib
from pathlib import Path

from mlx_serving.catalog.aliases import ALIASES
from mlx_serving.catalog.home import model_folder


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


def gguf_folder(gguf: Path, home: Path) -> Path:
    """Where a GGUF file's MLX folder is kept: named after the file as it is now, so that a changed
    file is converted anew."""
    facts = gguf.stat()
    identity = f"{gguf.resolve()}|{facts.st_size}|{facts.st_mtime_ns}"
    return model_folder(home, f"{gguf.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}")
