"""Runs a conversion job in a process of its own: what it needs (MLX, transformers) stays out of ours."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import msgspec

from mlx_serving.catalog.progress import Progress
from mlx_serving.errors import ModelBroken
from mlx_serving.worker import jobwire

_MODULE = "mlx_serving.runtime.convert.main"
_DESCRIBE = "mlx_serving.runtime.describe"
_STDERR_TAIL_BYTES = 2000


def convert_gguf(
    source: Path, folder: Path, progress: Progress, *, quantize: tuple[int, int] | None = None
) -> None:
    """Convert a GGUF file to an MLX folder; `quantize`: (bits, group size) for types MLX lacks.

    Raises ModelBroken by cause: corrupt_file, unsupported_architecture, unsupported_tokenizer,
    no_space, io_error, job_died.
    """
    flags = ["--quantize", f"{quantize[0]},{quantize[1]}"] if quantize else []
    run_job(["gguf", *flags, str(source.absolute()), str(folder.absolute())], progress)


def convert_tokenizer(source: Path, folder: Path, progress: Progress) -> None:
    """Make a tokenizer.json in `folder` from `source`'s slow tokenizer. Raises as `convert_gguf`."""
    run_job(["tokenizer", str(source.absolute()), str(folder.absolute())], progress)


def requantize(source: Path, folder: Path, flags: Sequence[str], progress: Progress) -> None:
    """Convert an MLX folder to another one. Raises as `convert_gguf`, and already_quantised or
    unsupported_recipe."""
    run_job(["mlx", *flags, str(source.absolute()), str(folder.absolute())], progress)


def run_job(arguments: list[str], progress: Progress, *, module: str = _MODULE) -> None:
    command = [sys.executable, "-m", module, "--json-progress", *arguments]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL
        )
        try:
            assert process.stdout is not None
            outcome = _follow(process.stdout, progress)
            status = process.wait()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        match outcome:
            case jobwire.Finished():
                progress.finish()
            case jobwire.Failed(code, message):
                raise ModelBroken(message, code=code)
            case None:
                size = errors.seek(0, 2)
                errors.seek(max(0, size - _STDERR_TAIL_BYTES))
                said = errors.read().decode(errors="replace").strip()
                raise ModelBroken(
                    f"the conversion job ended with status {status} before it was done: {said}",
                    code="job_died",
                )


def _follow(output: IO[bytes], progress: Progress) -> jobwire.Finished | jobwire.Failed | None:
    """Pass on progress; the job's last word, or None when it left without one."""
    outcome: jobwire.Finished | jobwire.Failed | None = None
    for line in output:
        try:
            event = jobwire.decode(line)
        except msgspec.DecodeError:
            continue  # a library's stray print
        match event:
            case jobwire.Started(task, total_bytes):
                progress.start(task, total_bytes)
            case jobwire.Advanced(n):
                progress.advance(n)
            case jobwire.Finished() | jobwire.Failed():
                outcome = event
    return outcome


def describe(folder: Path) -> jobwire.Described:
    """What the model's own code says of its caches. Raises ModelBroken (job_died)."""
    command = [sys.executable, "-m", _DESCRIBE, str(folder.absolute())]
    job = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, check=False)
    try:
        return msgspec.json.decode(job.stdout, type=jobwire.Described)
    except msgspec.DecodeError:
        said = job.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise ModelBroken(
            f"the model's code cannot be asked (status {job.returncode}): {''.join(said)}",
            code="job_died",
        ) from None
