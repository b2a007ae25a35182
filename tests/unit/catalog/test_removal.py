"""Removing models, and mending broken ones: nothing else is touched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlx_serving.catalog.health import Healthy, Machine, Unable
from mlx_serving.catalog.inventory import Place, locate
from mlx_serving.catalog.progress import Silent
from mlx_serving.catalog.removal import removable_bytes, remove
from mlx_serving.catalog.repair import repair
from mlx_serving.errors import ModelBroken
from model_folders import (
    WEIGHTS,
    cut_in_half,
    files,
    flip_last_byte,
    write_folder,
    write_hub,
)

MACHINE = Machine(extras=frozenset(), model_bytes=1 << 30)
_HOLD = """
import sys
from pathlib import Path
from mlx_serving.catalog.home import hold
hold(Path(sys.argv[1]), Path(sys.argv[2]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hub"


def test_a_converted_model_goes_whole(home: Path, cache: Path) -> None:
    path = write_folder(home / "models" / "mine")
    write_folder(home / "models" / ".removed-mine")
    place = locate("mine", home, cache)
    assert removable_bytes(place) == sum(map(len, files().values()))
    remove(place, home)
    assert list(path.parent.iterdir()) == []


def test_a_snapshot_goes_with_what_no_other_shares(home: Path, cache: Path) -> None:
    write_hub(cache, "org/m", files(parameters=8), commit="1" * 40, ref="old")
    kept = write_hub(cache, "org/m", files(parameters=9), commit="2" * 40)
    old = locate("org/m@old", home, cache)
    assert removable_bytes(old) == len(files(parameters=8)[WEIGHTS])
    remove(old, home)
    assert all(file.exists() for file in kept.iterdir())
    assert len(list((kept.parents[1] / "blobs").iterdir())) == len(files())
    remove(locate("org/m", home, cache), home)
    assert not list(cache.glob("models--*"))


def test_a_folder_from_elsewhere_is_left_alone(home: Path, cache: Path, tmp_path: Path) -> None:
    path = write_folder(tmp_path / "theirs")
    with pytest.raises(ModelBroken, match="yourself") as caught:
        remove(locate(str(path), home, cache), home)
    assert caught.value.code == "not_ours"
    assert path.is_dir()


def test_a_model_in_use_stays(home: Path, cache: Path) -> None:
    path = write_folder(home / "models" / "mine")
    command = [sys.executable, "-c", _HOLD, str(home), str(path)]
    user = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert user.stdout is not None and user.stdout.readline() == "held\n"
    try:
        with pytest.raises(ModelBroken, match="server or engine uses") as caught:
            remove(locate("mine", home, cache), home)
        assert caught.value.code == "in_use"
        assert path.is_dir()
    finally:
        user.kill()
        user.communicate()
    remove(locate("mine", home, cache), home)
    assert not path.exists()


def test_only_what_is_broken_is_fetched_again(fake_hub: Any, pull: Any) -> None:
    fake_hub.files = files()
    path = pull()["path"]
    cut_in_half(Path(path, WEIGHTS))
    before = fake_hub.served.copy()
    assert pull(mend=path)["path"] == path
    assert fake_hub.served - before == {WEIGHTS: len(fake_hub.files[WEIGHTS])}
    assert Path(path, WEIGHTS).read_bytes() == fake_hub.files[WEIGHTS]


def test_what_nobody_knows_the_origin_of_stays_broken(home: Path, tmp_path: Path) -> None:
    odd = write_folder(tmp_path / "odd", files(model_type="nobodys"))
    made = write_folder(home / "models" / "made")
    place = Place(name="made", source="converted", path=made)
    flip_last_byte(made / WEIGHTS)
    before, after = repair(place, MACHINE, home, Silent(), offline=True)
    assert before == after == Healthy()  # nobody foretold its hash
    cut_in_half(made / WEIGHTS)
    with pytest.raises(ModelBroken, match="nothing tells its origin") as caught:
        repair(place, MACHINE, home, Silent(), offline=True)
    assert caught.value.code == "not_repairable"
    assert made.is_dir()
    strange = Place(name="odd", source="folder", path=odd)
    before, _ = repair(strange, MACHINE, home, Silent(), offline=True)
    assert isinstance(before, Unable)
