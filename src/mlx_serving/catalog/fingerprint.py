"""Which model a folder holds, whatever it is called and wherever it lies."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path

from mlx_serving.catalog.folder import weight_files

SAMPLE_BYTES = 1024 * 1024


def fingerprint(folder: Path, tokenizer: Path, weights: Sequence[Path] | None = None) -> str:
    """SHA-256, in hex, over this program's version, the JSON files and, of each file of weights, its size, both ends (its
    header is at the beginning) and its middle: megabytes are read where all would be gigabytes.
    `weights`: those of a folder that is no model's."""
    digest = hashlib.sha256(_version().encode() + b"\0")
    for path in sorted({*folder.glob("*.json"), *tokenizer.glob("*.json")}):
        digest.update(path.name.encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    for path in weight_files(folder) if weights is None else weights:
        size = path.stat().st_size
        digest.update(b"%s\0%d\0" % (path.name.encode(), size))
        with path.open("rb") as file:
            for at in (0, size // 2, max(0, size - SAMPLE_BYTES)):
                file.seek(at)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _version() -> str:
    try:
        return importlib.metadata.version("mlx-serving")
    except importlib.metadata.PackageNotFoundError:
        return ""  # it runs from a source tree
