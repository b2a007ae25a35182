"""A conversion's result: room for it is checked before, and it is visible only once it is whole."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import msgspec

from mlx_serving.errors import ModelBroken
from mlx_serving.worker.jobwire import MANIFEST, Manifest


def publish(temporary: Path, folder: Path, job: Sequence[str] = ()) -> None:
    """Rename a finished folder into place; the first one to finish wins. `job` asks for a manifest."""
    if job:
        _write_manifest(temporary, job)
    try:
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
    directory = os.open(folder.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _write_manifest(folder: Path, job: Sequence[str]) -> None:
    digests = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    manifest = Manifest(job=tuple(job), sha256=digests)
    (folder / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2))


def check_space(parent: Path, needed: int) -> None:
    """Raises ModelBroken (no_space) unless `needed` bytes are free where `parent` is."""
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ModelBroken(
            f"converting needs {needed >> 20} MiB in {parent}, {free >> 20} MiB are free",
            code="no_space",
        )
