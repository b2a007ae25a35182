"""Who may be in memory: one figure for all models, and a pure decision of who leaves for whom."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mlx_serving.catalog.folder import ModelFolder

MIN_WORKING_BYTES = 32 << 20
WORKING_TOKENS = 1024
"""A model is loaded only where KV for so many tokens fits beside its weights."""
PATIENCE_S = 2.0
"""So long a model waits for others to fall idle before the least recently used is drained."""


def estimate_bytes(weight_bytes: int, *, widened: bool) -> int:
    """What a model needs, before it was ever loaded. `widened`: its half-precision weights become
    float32."""
    weights = weight_bytes * (2 if widened else 1)
    return weights + max(MIN_WORKING_BYTES, weights // 8)


def estimate_folder(folder: ModelFolder, dtype: str, system: str) -> int:
    """The same from its files. `dtype`: `Config.dtype`; on a CPU half types become float32 by default."""
    plain = folder.quantization is None and folder.dtype in ("float16", "bfloat16")
    wide = dtype in ("auto", "float32") and system != "Darwin"
    return estimate_bytes(folder.weight_bytes, widened=plain and wide)


def measured_bytes(weight_bytes: int, kv_bytes_per_token: int, context_length: int) -> int:
    """What a model needs, from what the worker said when it had loaded it."""
    kv = kv_bytes_per_token * min(context_length, WORKING_TOKENS)
    return weight_bytes + max(MIN_WORKING_BYTES, kv)


@dataclass(frozen=True, slots=True)
class Resident:
    """A model that holds memory."""

    model_id: str
    need_bytes: int
    used_s: float
    """When it was last used."""
    busy: bool = False
    """Requests use it, or wait for it."""
    pinned: bool = False
    loading: bool = False
    leaving: bool = False
    """It goes as soon as its requests have ended."""


@dataclass(frozen=True, slots=True)
class Fits:
    pass


@dataclass(frozen=True, slots=True)
class Evict:
    """These are idle: unload them."""

    model_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Drain:
    """No idle model would do, for too long: these take no more requests, and leave."""

    model_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Hold:
    """Wait: somebody is leaving, or may fall idle."""


@dataclass(frozen=True, slots=True)
class Never:
    """Not even alone with what is pinned."""

    most_bytes: int
    pinned: tuple[str, ...]


Decision = Fits | Evict | Drain | Hold | Never


def decide(
    budget_bytes: int,
    residents: Sequence[Resident],
    need_bytes: int,
    *,
    waited_s: float = 0.0,
    patience_s: float = PATIENCE_S,
) -> Decision:
    """What to do for a model that needs so many bytes. Least recently used models leave first; idle
    ones at once, busy ones after `patience_s`, pinned ones and those that are loading never."""
    pinned = [r for r in residents if r.pinned]
    most = budget_bytes - _total(pinned)
    if need_bytes > most:
        return Never(most, tuple(r.model_id for r in pinned))
    short = need_bytes - (budget_bytes - _total(residents))
    if short <= 0:
        return Fits()
    if _total(r for r in residents if r.leaving) >= short:
        return Hold()
    short -= _total(r for r in residents if r.leaving)
    movable = [r for r in residents if not (r.pinned or r.loading or r.leaving)]
    movable.sort(key=lambda r: r.used_s)
    idle = [r for r in movable if not r.busy]
    if chosen := _enough(idle, short):
        return Evict(chosen)
    if waited_s >= patience_s and (chosen := _enough([*idle, *_busy(movable)], short)):
        return Drain(chosen)
    return Hold()


def _busy(residents: Iterable[Resident]) -> list[Resident]:
    return [r for r in residents if r.busy]


def _enough(candidates: Sequence[Resident], short: int) -> tuple[str, ...]:
    """The first of them that free so much, less those that the later ones make needless."""
    chosen: list[Resident] = []
    for resident in candidates:
        if _total(chosen) >= short:
            break
        chosen.append(resident)
    if _total(chosen) < short:
        return ()
    for resident in tuple(chosen):
        if _total(chosen) - resident.need_bytes >= short:
            chosen.remove(resident)
    return tuple(r.model_id for r in chosen)


def _total(residents: Iterable[Resident]) -> int:
    return sum(r.need_bytes for r in residents)
