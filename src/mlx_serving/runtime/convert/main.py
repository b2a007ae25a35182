"""Entry of a conversion job: `python -m mlx_serving.runtime.convert.main [--json-progress] …`.

With `--json-progress` stdout carries `worker.jobwire` events; else the finished folder's path.
Exit status: 0 done, 1 failed (the reason is the last event, or on stderr).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from mlx_serving.errors import MLXServingError, ModelBroken
from mlx_serving.worker import jobwire

REPORT_S = 0.1
Emit = Callable[[jobwire.JobEvent], None]


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    options = _parser().parse_args(argv)
    options.again = [word for word in argv[:-1] if word != "--json-progress"]
    emit: Emit = _emit_json if options.json_progress else _emit_text
    try:
        _run(options, emit)
    except MLXServingError as e:
        emit(jobwire.Failed(e.code, e.message))
        return 1
    except OSError as e:
        emit(jobwire.Failed("no_space" if e.errno == 28 else "io_error", str(e)))
        return 1
    except Exception as e:  # a file nobody thought of must still be named, not traced
        error = ModelBroken(f"{options.source}: {type(e).__name__}: {e}", code="corrupt_file")
        emit(jobwire.Failed(error.code, error.message))
        return 1
    emit(jobwire.Finished(str(options.folder)))
    return 0


def _run(options: argparse.Namespace, emit: Emit) -> None:
    if options.job == "tokenizer":
        from mlx_serving.runtime.convert.tokenizer import convert_tokenizer

        emit(jobwire.Started("convert tokenizer", 0))
        convert_tokenizer(options.source, options.folder)
        return
    meter = _Meter(emit)
    if options.job == "mlx":
        _requantize(options, meter)
        meter.flush()
        return
    from mlx_serving.runtime.convert.gguf import Options, convert_gguf

    conversion = Options(quantize=options.quantize, dtype=options.dtype)
    convert_gguf(
        options.source, options.folder, conversion, meter.start, meter.advance, options.again
    )
    meter.flush()


def _requantize(options: argparse.Namespace, meter: _Meter) -> None:
    from mlx_serving.runtime.convert.requantize import Options, requantize

    names = ("quantize", "bits", "group_size", "mode", "recipe", "dequantize", "dtype")
    wanted = Options(**{name: getattr(options, name) for name in names})
    requantize(options.source, options.folder, wanted, meter.start, meter.advance, options.again)


class _Meter:
    """Sums up progress so that a line is printed ten times a second at most."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._pending = 0
        self._last = 0.0

    def start(self, task: str, total_bytes: int) -> None:
        self._emit(jobwire.Started(task, total_bytes))

    def advance(self, n: int) -> None:
        self._pending += n
        if time.monotonic() - self._last >= REPORT_S:
            self.flush()

    def flush(self) -> None:
        if self._pending:
            self._emit(jobwire.Advanced(self._pending))
        self._pending, self._last = 0, time.monotonic()


def _emit_json(event: jobwire.JobEvent) -> None:
    sys.stdout.buffer.write(jobwire.encode(event))
    sys.stdout.buffer.flush()


def _emit_text(event: jobwire.JobEvent) -> None:
    match event:
        case jobwire.Started() | jobwire.Advanced():
            pass
        case jobwire.Finished(path):
            sys.stdout.write(path + "\n")
        case jobwire.Failed(code, message):
            sys.stderr.write(f"{code}: {message}\n")


def _quantize(text: str) -> object:
    from mlx_serving.runtime.convert.gguf import Quantize

    try:
        bits, group_size = (int(part) for part in text.split(","))
    except ValueError as e:
        raise argparse.ArgumentTypeError("expected BITS,GROUP_SIZE such as 4,64") from e
    if bits not in (2, 3, 4, 5, 6, 8) or group_size not in (32, 64, 128):
        raise argparse.ArgumentTypeError("BITS is 2, 3, 4, 5, 6 or 8; GROUP_SIZE 32, 64 or 128")
    return Quantize(bits, group_size)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mlx_serving.runtime.convert.main")
    parser.add_argument("--json-progress", action="store_true")
    jobs = parser.add_subparsers(dest="job", required=True)
    gguf = jobs.add_parser("gguf", help="GGUF file to MLX folder")
    gguf.add_argument("--quantize", type=_quantize, metavar="BITS,GROUP_SIZE")
    gguf.add_argument("--dtype", choices=("auto", "float32", "float16", "bfloat16"), default="auto")
    tokenizer = jobs.add_parser("tokenizer", help="slow tokenizer files to tokenizer.json")
    mlx = jobs.add_parser("mlx", help="MLX folder to MLX folder: quantise, dequantise, cast")
    mlx.add_argument("--quantize", action="store_true")
    mlx.add_argument("--bits", type=int)
    mlx.add_argument("--group-size", type=int)
    mlx.add_argument("--mode", default="affine")
    mlx.add_argument("--recipe")
    mlx.add_argument("--dequantize", action="store_true")
    mlx.add_argument("--dtype", choices=("float32", "float16", "bfloat16"))
    for job in (gguf, tokenizer, mlx):
        job.add_argument("source", type=Path)
        job.add_argument("folder", type=Path)
    return parser


if __name__ == "__main__":
    sys.exit(main())
