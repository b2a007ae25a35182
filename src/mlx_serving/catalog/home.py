"""Where converted models, locks and marks are kept, and how they are locked."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


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


def sweep(parent: Path, prefix: str) -> None:
    """Remove what a killed process left half-done; call while holding its lock."""
    for leftover in parent.glob(f"{prefix}*"):
        shutil.rmtree(leftover, ignore_errors=True)
