"""Are a model's files the ones that were published? Their digests say so, where somebody gave them.

The hub's cache names a large file's content by its SHA-256; a conversion of ours writes `MANIFEST`
beside what it made.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import msgspec

from mlx_serving.catalog.folder import Problem
from mlx_serving.catalog.known import Known
from mlx_serving.catalog.progress import Progress
from mlx_serving.worker.jobwire import MANIFEST, Manifest

CHUNK_BYTES = 1 << 22
Which = Literal["changed", "unread", "all"]
"""Read only files that changed since they were last read; or also those never read; or all."""


def manifest(folder: Path) -> Manifest | None:
    """What the conversion that made the folder wrote of it."""
    try:
        return msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError):
        return None


def expected(folder: Path) -> dict[Path, str]:
    """file → `sha256:…`, for weights whose content was foretold. Users may edit the small files."""
    made = manifest(folder)
    if made is not None:
        return {folder / name: f"sha256:{digest}" for name, digest in made.sha256.items()}
    found: dict[Path, str] = {}
    for file in folder.iterdir():
        blob = file.resolve().name if file.is_symlink() else ""
        if re.fullmatch(r"[0-9a-f]{64}", blob):
            found[file] = f"sha256:{blob}"
    return found


def check_digests(
    wanted: Mapping[Path, str], known: Known, which: Which, progress: Progress, task: str
) -> list[Problem]:
    """Every file whose content is not the `wanted` one; a missing file is another's business."""
    wanted = {file: digest for file, digest in wanted.items() if file.is_file()}
    todo = [file for file in wanted if _must_read(file, known, which)]
    if todo:
        progress.start(f"check {task}", sum(file.stat().st_size for file in todo))
        for file in todo:
            kind = wanted[file].partition(":")[0]
            remember(file, f"{kind}:{digest_of(file, kind, progress)}", known)
        progress.finish()
    return [
        Problem(file=file.name, kind="wrong_hash", detail="is not what was published (its hash)")
        for file, digest in wanted.items()
        if known.get(file).digest not in (None, digest)
    ]


def _must_read(file: Path, known: Known, which: Which) -> bool:
    if which == "all":
        return True
    if known.get(file).digest is not None:
        return False
    return which == "unread" or known.last(file) is not None


def remember(file: Path, digest: str, known: Known) -> None:
    """The file's content, as it is now, has this digest."""
    record = known.get(file)
    record.digest = digest
    known.put(file, record)


def remember_all(digests: Mapping[Path, str], known: Known) -> None:
    """For files that were just written, and hashed on the way."""
    for file, digest in digests.items():
        if file.is_file():
            remember(file, digest, known)


def digest_of(file: Path, kind: str, progress: Progress) -> str:
    """`sha256`, or `git`: SHA-1 of the content after git's own header."""
    digest = hashlib.sha256() if kind == "sha256" else hashlib.sha1(usedforsecurity=False)
    if kind == "git":
        digest.update(f"blob {file.stat().st_size}\0".encode())
    for block in _blocks(file):
        digest.update(block)
        progress.advance(len(block))
    return digest.hexdigest()


def _blocks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while block := stream.read(CHUNK_BYTES):
            yield block
