"""Prefixes from disk: the bits of computing them, for every kind of architecture, whatever the disk does."""

from __future__ import annotations

import dataclasses
import errno
import random
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_serving.runtime import native
from mlx_serving.runtime.backend.disk import Files
from mlx_serving.runtime.core.plan import Limits
from mlx_serving.runtime.native import install
from model import zoo
from model.disk_server import ROWS, Answer, Server
from model.driver import BUCKET

STEP = 16
BLOCK_BYTES = 128 * 1024
PLAIN = Limits(
    max_num_seqs=ROWS,
    prefill_step_size=STEP,
    context_length=512,
    kv_capacity_tokens=4096,
    kv_bucket_tokens=BUCKET,
)
CACHED = dataclasses.replace(
    PLAIN,
    prefix_blocks=8,
    prefix_block_tokens=STEP,
    prefix_whole_chunks=True,
    disk_block_bytes=BLOCK_BYTES,
    disk_bytes=100 * BLOCK_BYTES,
)
SMALL = dataclasses.replace(CACHED, prefix_blocks=5, disk_bytes=6 * BLOCK_BYTES)
"""Both tiers evict."""

_models: dict[str, Any] = {}


def model_of(name: str) -> Any:
    if name not in _models:
        _models.clear()
        _models[name] = zoo.build(name)
    return _models[name]


def tokens(seed: int, count: int) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(1, zoo.VOCAB) for _ in range(count))


def same(got: Answer, expected: Answer) -> bool:
    return got[:2] == expected[:2]


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_after_a_restart_a_prefix_comes_from_disk_with_the_bits_of_computing_it(
    name: str, tmp_path: Path
) -> None:
    model, prompt = model_of(name), tokens(1, 3 * STEP + 5)
    expected = Server(model, PLAIN).answer(prompt)[0]
    first = Server(model, CACHED, tmp_path)
    assert same(first.answer(prompt)[0], expected)
    first.stop()
    second = Server(model, CACHED, tmp_path)
    (got,) = second.answer(prompt)
    assert got[2] == 3 * STEP and second.prefilled == 5
    assert same(got, expected)
    # From memory, which the disk has filled; and a sequence that branches off.
    branch = (*prompt[: 2 * STEP + 3], *tokens(2, 9))
    assert same(second.answer(prompt)[0], expected)
    (got,) = second.answer(branch)
    assert got[2] == 2 * STEP and same(got, Server(model, PLAIN).answer(branch)[0])
    assert second.counts.read == 3 and second.counts.lost == 0
    second.stop()


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[int, ...] | None]:
    """Prompts that branch off each other at random points; None: the worker is started again."""
    prompts: list[tuple[int, ...] | None] = [tokens(0, 60)]
    trunks = [tokens(0, 60)]
    for seed in range(1, draw(st.integers(3, 7))):
        if draw(st.booleans()):
            prompts.append(None)
        origin = draw(st.sampled_from(trunks))
        cut = draw(st.integers(0, len(origin)))
        trunks.append((*origin[:cut], *tokens(seed, draw(st.integers(1, 40)))))
        prompts.append(trunks[-1])
    return prompts


@pytest.mark.parametrize("name", zoo.each_kind())
def test_branches_evictions_and_restarts_change_no_bit(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    expected: dict[tuple[int, ...], Answer] = {}
    examples = iter(range(1000))

    @settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck))
    @given(histories(), st.booleans())
    def check(history: list[tuple[int, ...] | None], together: bool) -> None:
        folder = tmp_path / str(next(examples))
        server = Server(model, SMALL, folder)
        for prompt in history:
            if prompt is None:
                server.stop()
                server = Server(model, SMALL, folder)
                continue
            if prompt not in expected:
                expected[prompt] = Server(model, PLAIN).answer(prompt)[0]
            for got in server.answer(*[prompt] * (1 + together)):
                # Beside another row bits may differ here, as without a cache.
                assert got[0] == expected[prompt][0] if together else same(got, expected[prompt])
        server.stop()
        assert folder_bytes(folder) <= SMALL.disk_bytes

    check()


@pytest.mark.skipif(not native.available(), reason="needs the native kernels")
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_with_the_native_kernels_any_block_comes_back_with_its_bits(
    name: str, tmp_path: Path
) -> None:
    model = zoo.build(name)
    install.accelerate(model)
    limits = dataclasses.replace(
        CACHED, prefix_blocks=60, prefix_block_tokens=4, prefix_whole_chunks=False
    )
    server = Server(model, limits, tmp_path)
    talk = tokens(3, 21)
    for turn in range(4):
        answer = server.answer(talk)[0]
        assert same(answer, Server(model, PLAIN).answer(talk)[0])
        talk = (*talk, *answer[0], *tokens(10 + turn, 7))
        server.stop()
        server = Server(model, limits, tmp_path)
    (got,) = server.answer(talk)
    assert got[2] >= len(talk) - 7 - 4, "an answer is part of the next prompt's prefix"
    assert same(got, Server(model, PLAIN).answer(talk)[0])
    server.stop()


# -- faults -----------------------------------------------------------------------------------

PROMPT = tokens(1, 3 * STEP + 5)


def files_of(folder: Path) -> list[Path]:
    """Of the prompt's blocks, the first first."""
    files = folder.glob("kv-*/*.safetensors")
    return sorted(files, key=lambda path: int(path.stem.rsplit("-", 1)[1]))


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


SLOW = [pytest.param(n, marks=pytest.mark.slow) for n in ("gemma3_text", "deepseek_v3")]


@pytest.fixture(params=["llama", "falcon_h1", *SLOW])
def filled(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Any, Path, Answer]]:
    """(model, folder that has the prompt's blocks, what the prompt gives)."""
    model = model_of(request.param)
    server = Server(model, CACHED, tmp_path)
    (expected,) = server.answer(PROMPT)
    server.stop()
    assert len(files_of(tmp_path)) == 3
    yield model, tmp_path, expected


def truncate(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_data(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 4
    path.write_bytes(data)


def flip_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[8 + data[8:200].index(b"offsets") + 12] ^= 1
    path.write_bytes(data)


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


def another_version(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"prefix block 1", b"prefix block 9"))


def another_block(path: Path) -> None:
    others = [other for other in path.parent.iterdir() if other != path]
    path.write_bytes(others[0].read_bytes())


def not_safetensors(path: Path) -> None:
    path.write_bytes(b"\xff" * 500)


def delete(path: Path) -> None:
    path.unlink()


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = (
    truncate,
    empty,
    flip_data,
    flip_header,
    lengthen,
    another_version,
    another_block,
    not_safetensors,
    delete,
    folder_instead,
)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("which", [0, 1])
def test_a_damaged_block_is_computed_again(
    filled: tuple[Any, Path, Answer],
    damage: Callable[[Path], None],
    which: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, folder, expected = filled
    server = Server(model, CACHED, folder)
    damage(files_of(folder)[which])
    (got,) = server.answer(PROMPT)
    assert same(got, expected) and got[2] == which * STEP
    assert server.counts.lost == 1
    assert "dropped cache block" in caplog.text
    server.settle()
    if damage is not folder_instead:
        assert server.counts.not_written == 0 and len(files_of(folder)) == 3, "it is kept anew"
    server.stop()
    server = Server(model, CACHED, folder)
    assert same(server.answer(PROMPT)[0], expected)
    server.stop()


def test_a_bit_flipped_anywhere_is_found(filled: tuple[Any, Path, Answer]) -> None:
    model, folder, expected = filled
    path = files_of(folder)[0]
    whole = path.read_bytes()
    rng = random.Random(5)
    header = 8 + int.from_bytes(whole[:8], "little")
    for at in (*range(8), *(rng.randrange(8, header) for _ in range(12)), len(whole) - 1):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        server = Server(model, CACHED, folder)
        (got,) = server.answer(PROMPT)
        assert same(got, expected)
        server.stop()


def test_the_folder_may_be_deleted_while_it_is_used(filled: tuple[Any, Path, Answer]) -> None:
    model, folder, expected = filled
    server = Server(model, CACHED, folder)
    shutil.rmtree(folder)
    (got,) = server.answer(PROMPT)
    assert same(got, expected) and got[2] == 0
    server.settle()
    assert len(files_of(folder)) == 3, "the folder is made again"
    server.stop()


def test_another_models_files_are_left_alone_until_room_is_needed(
    filled: tuple[Any, Path, Answer],
) -> None:
    model, folder, expected = filled
    used = folder_bytes(folder)
    ours = dataclasses.replace(CACHED, disk_bytes=used + 2 * BLOCK_BYTES)
    server = Server(model, ours, folder, identity="1" * 32)
    (got,) = server.answer(PROMPT)
    assert same(got, expected) and got[2] == 0 and server.counts.lost == 0
    server.stop()
    assert folder_bytes(folder) <= ours.disk_bytes
    less = dataclasses.replace(CACHED, disk_bytes=used // 2)
    Server(model, less, folder, identity="2" * 32).stop()
    assert folder_bytes(folder) <= used // 2


def test_files_that_are_not_ours_are_never_touched(filled: tuple[Any, Path, Answer]) -> None:
    model, folder, _ = filled
    (folder / "notes").mkdir()
    for name in ("a.safetensors", "notes/b.safetensors"):
        (folder / name).write_bytes(b"mine")
    server = Server(model, dataclasses.replace(CACHED, disk_bytes=1), folder)
    server.answer(PROMPT)
    server.stop()
    assert files_of(folder) == []
    assert (folder / "notes/b.safetensors").exists() and (folder / "a.safetensors").exists()


def test_two_servers_may_share_a_folder(filled: tuple[Any, Path, Answer]) -> None:
    model, folder, expected = filled
    other_prompt = tokens(9, 3 * STEP + 5)
    one, two = Server(model, CACHED, folder), Server(model, CACHED, folder)
    wanted = Server(model, PLAIN).answer(other_prompt)[0]
    for _ in range(2):
        for server in (one, two):
            assert same(server.answer(PROMPT)[0], expected)
            assert same(server.answer(other_prompt)[0], wanted)
    one.settle()
    two.stop()
    one.stop()
    third = Server(model, CACHED, folder)
    assert third.answer(other_prompt)[0][2] == third.answer(PROMPT)[0][2] == 3 * STEP
    third.stop()


class Full(Files):
    """A disk without room, until somebody makes some."""

    full = True

    def write(self, path: Path, parts: Sequence[bytes | memoryview]) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().write(path, parts)


@pytest.mark.parametrize("name", ["llama", "falcon_h1"])
def test_a_full_disk_is_no_error(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, files = model_of(name), Full()
    expected = Server(model, PLAIN).answer(PROMPT)[0]
    server = Server(model, CACHED, tmp_path, files=files)
    assert same(server.answer(PROMPT)[0], expected)
    server.settle()
    assert server.counts.not_written == 3 and "no room is left" in caplog.text
    files.full = False
    assert same(server.answer(PROMPT)[0], expected)
    server.settle()
    assert files_of(tmp_path) == [], "it is left in peace for a while"
    server.now_s += 60
    (got,) = server.answer(PROMPT)
    assert same(got, expected) and got[2] == 3 * STEP
    server.settle()
    assert len(files_of(tmp_path)) == 3
    server.stop()


class Stuck(Files):
    """A disk that does nothing until it is let."""

    def __init__(self) -> None:
        self.goes_on = threading.Event()

    def open(self, path: Path) -> BinaryIO:
        self.goes_on.wait()
        return super().open(path)

    def write(self, path: Path, parts: Sequence[bytes | memoryview]) -> None:
        self.goes_on.wait()
        super().write(path, parts)


def test_a_slow_disk_delays_nobody_for_long(filled: tuple[Any, Path, Answer]) -> None:
    model, folder, expected = filled
    files = Stuck()
    server = Server(model, CACHED, folder, files=files)
    schedule = server.scheduler.schedule

    def later(_now_s: float) -> Any:
        server.now_s += 0.1  # a virtual clock
        return schedule(server.now_s)

    server.scheduler.schedule = later  # type: ignore[method-assign]
    (got,) = server.answer(PROMPT)
    assert same(got, expected) and got[2] == 0
    assert server.counts.late == 1
    (got,) = server.answer(PROMPT)
    assert same(got, expected) and got[2] == 3 * STEP, "from memory"
    files.goes_on.set()
    server.stop()
