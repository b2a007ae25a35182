"""What MODEL means, decided from its spelling and what is on disk; acting on it is `ensure`'s part."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mlx_serving.catalog.aliases import ALIASES, Alias
from mlx_serving.errors import ModelNotFound

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class LocalFolder:
    path: Path


@dataclass(frozen=True, slots=True)
class LocalGGUF:
    path: Path


@dataclass(frozen=True, slots=True)
class AliasOf:
    alias: Alias


@dataclass(frozen=True, slots=True)
class HubRepo:
    repo: str
    revision: str | None


@dataclass(frozen=True, slots=True)
class Unknown:
    """Nothing that MODEL could mean exists; `tried` says what was looked for."""

    tried: tuple[str, ...]


Found = LocalFolder | LocalGGUF | AliasOf | HubRepo
ModelSource = Found | Unknown


class Disk(Protocol):
    """The two questions that the decision asks of the file system."""

    def is_folder(self, path: Path) -> bool: ...

    def is_file(self, path: Path) -> bool: ...


class RealDisk:
    def is_folder(self, path: Path) -> bool:
        return path.is_dir()

    def is_file(self, path: Path) -> bool:
        return path.is_file()


def decide(spec: str, aliases: Mapping[str, Alias], models: Path, disk: Disk) -> ModelSource:
    """An alias, then a path that exists, then a model of our own in `models`, then a hub id.

    A local folder wins over a hub id spelled the same; `./NAME` names a folder that an alias hides.
    """
    if spec in aliases:
        return AliasOf(aliases[spec])
    path = Path(spec).expanduser()
    if disk.is_folder(path):
        return LocalFolder(path)
    if disk.is_file(path):
        if path.suffix.lower() == ".gguf":
            return LocalGGUF(path)
        return Unknown((f"file {spec} (neither a folder nor a .gguf file)",))
    if spec.startswith((".", "/", "~")) or path.suffix.lower() == ".gguf":
        return Unknown((f"path {path} (does not exist)",))
    if "/" not in spec and disk.is_folder(models / spec):
        return LocalFolder(models / spec)
    if match := _HUB_ID.fullmatch(spec):
        return HubRepo(match["repo"], match["revision"])
    return Unknown(
        (f"folder or file {spec}", f"converted model {models / spec}", "alias", "hub id (ORG/NAME)")
    )


def resolve(spec: str, home: Path) -> Found:
    """What MODEL means now. Raises ModelNotFound saying what was tried."""
    source = decide(spec, ALIASES, home / "models", RealDisk())
    if isinstance(source, Unknown):
        raise ModelNotFound(unknown_message(spec, source.tried, ALIASES), param="model")
    return source


def unknown_message(spec: str, tried: Iterable[str], aliases: Iterable[str]) -> str:
    return f"no model {spec!r}; tried: {', '.join(tried)}. Aliases: {', '.join(sorted(aliases))}"
