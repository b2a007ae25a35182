"""What MODEL means: a pure decision over a fake disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from mlx_serving.catalog.aliases import ALIASES
from mlx_serving.catalog.ensure import ensure
from mlx_serving.catalog.home import models_home
from mlx_serving.catalog.names import default_name
from mlx_serving.catalog.resolve import (
    AliasOf,
    HubRepo,
    LocalFolder,
    LocalGGUF,
    ModelSource,
    Unknown,
    decide,
)
from mlx_serving.config import Config
from mlx_serving.errors import ModelNotFound

MODELS = Path("/home/models")


@dataclass
class FakeDisk:
    folders: frozenset[str] = frozenset()
    files: frozenset[str] = frozenset()

    def is_folder(self, path: Path) -> bool:
        return str(path) in self.folders

    def is_file(self, path: Path) -> bool:
        return str(path) in self.files


DISK = FakeDisk(
    frozenset({"/m/tiny", "org/local", "smollm2-135m", "/home/models/mine"}),
    frozenset({"/m/a.gguf", "/m/B.GGUF", "/m/notes.txt"}),
)


@pytest.mark.parametrize(
    ("spec", "source"),
    [
        ("/m/tiny", LocalFolder(Path("/m/tiny"))),
        ("org/local", LocalFolder(Path("org/local"))),
        ("./smollm2-135m", LocalFolder(Path("smollm2-135m"))),
        ("smollm2-135m", AliasOf(ALIASES["smollm2-135m"])),
        ("/m/a.gguf", LocalGGUF(Path("/m/a.gguf"))),
        ("/m/B.GGUF", LocalGGUF(Path("/m/B.GGUF"))),
        ("mine", LocalFolder(Path("/home/models/mine"))),
        ("org/name", HubRepo("org/name", None)),
        ("org/name-1.5@v1.0", HubRepo("org/name-1.5", "v1.0")),
        ("org/name@refs/pr/1", HubRepo("org/name", "refs/pr/1")),
    ],
)
def test_each_spelling_has_one_meaning(spec: str, source: ModelSource) -> None:
    assert decide(spec, ALIASES, MODELS, DISK) == source


@pytest.mark.parametrize(
    ("spec", "tried"),
    [
        ("/m/gone", "does not exist"),
        ("./gone", "does not exist"),
        ("gone.gguf", "does not exist"),
        ("/m/notes.txt", "neither a folder nor a .gguf file"),
        ("nope", "hub id"),
        ("a/b/c", "hub id"),
        ("org/na me", "hub id"),
        ("", "hub id"),
    ],
)
def test_what_means_nothing_says_what_was_tried(spec: str, tried: str) -> None:
    source = decide(spec, ALIASES, MODELS, DISK)
    assert isinstance(source, Unknown)
    assert tried in "; ".join(source.tried)


def test_an_unknown_name_lists_the_aliases(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound) as caught:
        ensure("nope", Config(home=str(tmp_path)))
    for alias in ALIASES:
        assert alias in caught.value.message
    assert "nope" in caught.value.message


def test_default_names(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    assert default_name(str(folder)) == "tiny"
    assert default_name(str(tmp_path / "a.gguf")) == "a"
    assert default_name("org/name@main") == "org/name"
    assert default_name("smollm2-135m") == "smollm2-135m"


def test_the_home_follows_the_setting_then_the_system() -> None:
    assert models_home("/x", {"XDG_CACHE_HOME": "/c"}) == Path("/x")
    assert models_home(None, {"XDG_CACHE_HOME": "/c"}) == Path("/c/mlx-serving")
    assert models_home(None, {}) == Path.home() / ".cache" / "mlx-serving"
