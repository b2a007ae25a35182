"""Where converted models, locks and marks are kept, and how they are locked."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from mlx_serving.errors import ModelBroken


def models_home(home: str | None, environ: Mapping[str, str]) -> Path:
    """The configured home, else `$XDG_CACHE_HOME/mlx-serving`, else `~/.cache/mlx-serving`."""
    if home:
        return Path(home).expanduser().absolute()
    cache = environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "mlx-serving"


def model_folder(home: Path, name: str) -> Path:
    return home / "models" / name


@contextmanager
def exclusive(home: Path, name: str) -> Iterator[None]:
    """Held by one process at a time; freed by the system when that process dies."""
    path = home / "locks" / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


_held: dict[Path, int] = {}
"""Locks of the models that this process uses; the system frees them when it ends."""


def hold(home: Path, model: Path) -> None:
    """Say that this process uses the model from now on, so that no other removes it."""
    lock = _use_lock(home, model)
    if lock in _held:
        return
    with suppress(OSError):  # a home that cannot be written, a file system without locks
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(handle, fcntl.LOCK_SH)
        _held[lock] = handle


@contextmanager
def unused(home: Path, model: Path) -> Iterator[None]:
    """No process can begin to use the model inside. Raises ModelBroken (in_use) if one does already."""
    lock = _use_lock(home, model)
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ModelBroken(
                f"a running server or engine uses the model in {model}; stop it first",
                code="in_use",
            ) from None
        yield


def _use_lock(home: Path, model: Path) -> Path:
    key = hashlib.sha256(str(model.absolute()).encode()).hexdigest()[:16]
    return home / "locks" / f"use-{key}.lock"


def check_space(folder: Path, needed: int) -> None:
    """Raises ModelBroken (no_space) unless `needed` bytes are free where `folder` is, or will be."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ModelBroken(
            f"fetching needs {needed >> 20} MiB in {existing}, {free >> 20} MiB are free",
            code="no_space",
        )


def sweep(parent: Path, prefix: str) -> None:
    """Remove the temporary folders of this prefix that a killed process left; call while holding its
    lock."""
    for leftover in parent.glob(f"{glob.escape(prefix)}*"):
        # What tempfile appends has no dot: `.qwen2.5.x` is another model's than `.qwen2.`.
        if "." not in leftover.name.removeprefix(prefix):
            shutil.rmtree(leftover, ignore_errors=True)
