"""SmolLM2's prefixes over restarts, worker deaths and damage, through the whole engine."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from mlx_serving import Engine
from mlx_serving.runtime.native import available
from mlx_serving.types import CacheStats

pytestmark = [pytest.mark.slow, pytest.mark.model]

PROMPT = [(7 * i) % 3000 + 100 for i in range(200)]
# Without the native kernels a block is a chunk of 8 tokens, and answers are not reused.
REUSED = 192


def engine(model_dir: Path, folder: Path, **settings: object) -> Engine:
    return Engine(str(model_dir), kv_disk_path=str(folder), **settings)


async def ask(engine: Engine) -> tuple[list[int], int]:
    done = await engine.complete(PROMPT, max_tokens=4, temperature=0)
    return list(done.answers[0].token_ids), done.usage.cached_tokens


def stats(engine: Engine) -> CacheStats:
    (found,) = engine.gateway.cache_stats().values()
    return found


def files(folder: Path) -> list[Path]:
    """The first block's first."""
    found = folder.glob("kv-*/*.safetensors")
    return sorted(found, key=lambda path: int(path.stem.rsplit("-", 1)[1]))


async def test_a_prefix_survives_restarts_deaths_and_damage(
    model_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "kv"
    async with engine(model_dir, folder) as first:
        expected, cached = await ask(first)
        assert cached == 0
    # Leaving lets the disk finish.
    blocks = len(files(folder))
    assert blocks >= (REUSED // 16 if available() else 1)
    async with engine(model_dir, folder) as second:
        tokens, cached = await ask(second)
        assert tokens == expected and cached == REUSED
        assert stats(second).disk_hit_tokens == REUSED and stats(second).disk_lost == 0
        (worker,) = second.gateway.health()["workers"]  # type: ignore[misc]
        os.kill(worker["pid"], signal.SIGKILL)
        tokens, cached = await ask(second)
        assert tokens == expected and cached == REUSED
    damaged = files(folder)[1]
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    async with engine(model_dir, folder) as third:
        tokens, cached = await ask(third)
        assert tokens == expected and 0 < cached < REUSED
        assert stats(third).disk_lost == 1
        shutil.rmtree(folder)
        tokens, cached = await ask(third)
        assert tokens == expected and cached == REUSED, "from memory"
    async with engine(model_dir, folder) as fourth:
        tokens, _ = await ask(fourth)
        assert tokens == expected


async def test_another_number_of_bits_is_another_cache(model_dir: Path, tmp_path: Path) -> None:
    """Blocks of the exact kernels are not read by the fast ones."""
    async with engine(model_dir, tmp_path) as first:
        await ask(first)
    kernels = "fast" if available() else "off"
    async with engine(model_dir, tmp_path, kernels=kernels) as second:
        _, cached = await ask(second)
        if available():
            assert cached == 0
            assert stats(second).disk_bytes > 0, "the others' files are counted"
