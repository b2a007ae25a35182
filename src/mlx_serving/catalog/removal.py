"""Takes a model's files off this machine: its own, and nothing that another model shares."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import assert_never

from mlx_serving.catalog.home import exclusive, unused
from mlx_serving.catalog.inventory import Place
from mlx_serving.errors import ModelBroken


def removable_bytes(place: Place) -> int:
    """What `remove` would free: files that only this model has. Raises as `remove`."""
    return sum(file.lstat().st_size for file in _files(place))


def remove(place: Place, home: Path) -> None:
    """Raises ModelBroken: in_use while a server or engine uses it, not_ours for a folder that was
    not made or fetched by us."""
    doomed = _files(place)
    path = place.path
    assert path is not None
    with unused(home, path):
        match place.source:
            case "alias" | "converted" | "folder":
                _remove_own(path, home)
            case "hub":
                _remove_snapshot(path, doomed)
            case _:
                assert_never(place.source)


def _files(place: Place) -> list[Path]:
    path = place.path
    assert path is not None, "only what is there can be removed"
    match place.source:
        case "alias" | "converted":
            return [file for file in path.rglob("*") if file.is_file()]
        case "hub":
            return _blobs_of_its_own(path)
        case "folder":
            raise ModelBroken(
                f"{path} is neither in the hub's cache nor among the converted models: "
                "remove the folder yourself",
                code="not_ours",
            )
        case _:
            assert_never(place.source)


def _remove_own(path: Path, home: Path) -> None:
    """Out of sight at once, by a rename; what a killed removal leaves is swept by the next."""
    with exclusive(home, path.name):
        hidden = path.with_name(f".removed-{path.name}")
        shutil.rmtree(hidden, ignore_errors=True)
        path.rename(hidden)
        shutil.rmtree(hidden)


def _blobs_of_its_own(snapshot: Path) -> list[Path]:
    def blobs(folder: Path) -> set[Path]:
        return {link.resolve() for link in folder.rglob("*") if link.is_symlink()}

    others = [other for other in snapshot.parent.iterdir() if other != snapshot]
    shared = set[Path]().union(*map(blobs, others))
    return sorted(blob for blob in blobs(snapshot) - shared if blob.is_file())


def _remove_snapshot(snapshot: Path, blobs: list[Path]) -> None:
    repo = snapshot.parents[1]
    for ref in (repo / "refs").rglob("*"):
        if ref.is_file() and ref.read_text().strip() == snapshot.name:
            ref.unlink()
    shutil.rmtree(snapshot)
    for blob in blobs:
        blob.unlink(missing_ok=True)
    if not any(snapshot.parent.iterdir()):
        shutil.rmtree(repo)
