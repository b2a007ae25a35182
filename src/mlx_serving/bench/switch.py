"""The time to the first token when a request's model is another than the last one's.

Three copies of a model, so that none has the others' pages. Four engines take turns, one round each:
one holds all of them; one holds two, so that whoever comes back has to be loaded, from the disk or from
the page cache; two prefetch, one that holds two and one that holds one model.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_serving.bench.pages import cached, drop
from mlx_serving.bench.workloads import token_ids
from mlx_serving.catalog.budget import measured_bytes
from mlx_serving.config import Config
from mlx_serving.engine import Engine

NAMES = ("a", "b", "c")
PROMPT_TOKENS = 16
RESIDENT_PAIRS = 20
_RNG = random.Random(4)
SETTLE_S = 60.0
"""How long a prefetch may take."""


@dataclass(frozen=True, slots=True)
class Switch:
    """Seconds to the first token; medians, and medians of the ratios round by round."""

    same_s: float
    """The model answered the last request too."""
    resident_s: float
    """What another one in memory takes longer: medians of the differences."""
    cold_s: float
    cached_s: float
    cached_ratio: float
    """To cold, as the next ones."""
    read_ahead_s: float
    read_ahead_ratio: float
    loaded_ahead_s: float
    loaded_ahead_ratio: float
    pages_kept: float
    """The largest share of a model's pages that the system would not drop: cold is as cold as that."""


async def measure(model: Path, *, rounds: int) -> Switch:
    with tempfile.TemporaryDirectory(prefix=".bench-switch-", dir=model.parent) as scratch:
        folders = {name: Path(scratch) / name for name in NAMES}
        for folder in folders.values():
            await asyncio.to_thread(shutil.copytree, model, folder)
        need = await _need(folders["a"])
        async with (
            _engine(folders, 3.5 * need) as all_,
            _engine(folders, 2.5 * need) as two,
            _engine(folders, 2.5 * need, prefetch=0.5) as ahead,
            _engine(folders, 1.5 * need, prefetch=0.5) as read,
        ):
            for engine in (ahead, read):
                for name in NAMES * 3:
                    await _ttft_s(engine, name)
            found = [await _round(folders, all_, two, ahead, read, i) for i in range(rounds)]
    return _summary(found)


@dataclass(frozen=True, slots=True)
class _Round:
    same_s: float
    resident_s: float
    cold_s: float
    cached_s: float
    read_ahead_s: float
    loaded_ahead_s: float
    kept: float


async def _round(
    folders: dict[str, Path], all_: Engine, two: Engine, ahead: Engine, read: Engine, turn: int
) -> _Round:
    same_s, more_s = await _resident(all_)
    name = NAMES[turn % 3]
    kept = drop(folders[name])
    cold_s = await _come_back(two, name)
    cached_s = await _come_back(two, name)
    next_ = NAMES[(turn + 1) % 3]
    read_s, read_kept = await _prefetched(
        read, folders, turn, lambda: cached(folders[next_], "*.safetensors") > 0.99
    )
    ahead_s, ahead_kept = await _prefetched(ahead, folders, turn, lambda: _is_loaded(ahead, next_))
    kept = max(kept, read_kept, ahead_kept)
    return _Round(same_s, more_s, cold_s, cached_s, read_s, ahead_s, kept)


async def _prefetched(
    engine: Engine,
    folders: dict[str, Path],
    turn: int,
    prepared: Callable[[], bool],
) -> tuple[float, float]:
    """Of the model that was prepared in the last round; the next one is, from the disk."""
    name, next_ = NAMES[turn % 3], NAMES[(turn + 1) % 3]
    kept = drop(folders[next_])
    ttft_s = await _ttft_s(engine, name)
    async with asyncio.timeout(SETTLE_S):
        while not prepared():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return ttft_s, kept


def _is_loaded(engine: Engine, name: str) -> bool:
    return any(model.id == name and model.status == "ready" for model in engine.gateway.models())


async def _resident(engine: Engine) -> tuple[float, float]:
    """Without a switch, and by how much longer with one."""
    same, other = [], []
    for i in range(RESIDENT_PAIRS):
        name, next_ = NAMES[i % 3], NAMES[(i + 1) % 3]
        await _ttft_s(engine, name)
        same.append(await _ttft_s(engine, name))
        other.append(await _ttft_s(engine, next_))
    return statistics.median(same), statistics.median(
        b - a for a, b in zip(same, other, strict=True)
    )


async def _come_back(engine: Engine, name: str) -> float:
    """After the two others, which leave no room for it."""
    others = [other for other in NAMES if other != name]
    for other in others:
        await _ttft_s(engine, other)
    return await _ttft_s(engine, name)


async def _ttft_s(engine: Engine, name: str) -> float:
    prompt = token_ids(_RNG, PROMPT_TOKENS)
    began_s = time.perf_counter()
    async for _ in engine.generate(
        prompt, model=name, max_tokens=1, temperature=0.0, ignore_eos=True
    ):
        return time.perf_counter() - began_s
    raise RuntimeError(f"{name} gave no token")


async def _need(folder: Path) -> int:
    """What a copy takes in memory."""
    async with Engine(str(folder)) as engine:
        info = engine.gateway.model_info(engine.gateway.default_model())
        assert info is not None
        return measured_bytes(info.held_bytes, info.kv_bytes_per_token, info.context_length)


@contextlib.asynccontextmanager
async def _engine(
    folders: dict[str, Path], budget_bytes: float, prefetch: float = 0.0
) -> AsyncIterator[Engine]:
    models = [{"model": str(folder), "name": name} for name, folder in folders.items()]
    config = Config(memory_budget=budget_bytes, prefetch=prefetch)
    async with Engine(models, config=config) as engine:
        for name in NAMES:
            await _ttft_s(engine, name)
        yield engine


def _summary(found: Sequence[_Round]) -> Switch:
    def of(name: str) -> float:
        return float(statistics.median(getattr(r, name) for r in found))

    def ratio(name: str) -> float:
        return float(statistics.median(getattr(r, name) / r.cold_s for r in found))

    return Switch(
        same_s=of("same_s"),
        resident_s=of("resident_s"),
        cold_s=of("cold_s"),
        cached_s=of("cached_s"),
        cached_ratio=ratio("cached_s"),
        read_ahead_s=of("read_ahead_s"),
        read_ahead_ratio=ratio("read_ahead_s"),
        loaded_ahead_s=of("loaded_ahead_s"),
        loaded_ahead_ratio=ratio("loaded_ahead_s"),
        pages_kept=max(r.kept for r in found),
    )
