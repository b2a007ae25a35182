"""Keeps the weights of pinned models in physical memory, where the platform lets us.

On a CPU their pages are locked (`mlock`); with Metal the wired limit is what pinned models hold. A
refusal is no error: the model stays loaded, and the reason is told. Imports no MLX until Metal is asked.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, Protocol, assert_never

from mlx_serving import host
from mlx_serving.runtime.backend.model import Span, Weights
from mlx_serving.worker.wire import Wired

log = logging.getLogger(__name__)

LOCK_SHARE = 0.9
"""Of the memory that the machine, or the control group, lets us use: what is locked cannot be
reclaimed, and the rest has to live too."""
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
LEAST_MACOS = (15, 0)
"""Older ones have no residency sets, and MLX's wired limit does nothing."""


class Pages(Protocol):
    """The system's calls. Addresses and sizes are whole pages."""

    def lock(self, span: Span) -> None:
        """Raises OSError."""
        ...

    def unlock(self, span: Span) -> None: ...

    def limit_bytes(self) -> int | None:
        """What an unprivileged process may lock; None: as much as it likes."""
        ...


@dataclass(frozen=True, slots=True)
class LockPages:
    pass


@dataclass(frozen=True, slots=True)
class LimitMetal:
    """Have MLX wire so much."""

    bytes: int


@dataclass(frozen=True, slots=True)
class Refuse:
    why: str


Decision = LockPages | LimitMetal | Refuse


def decide(
    device: Literal["cpu", "metal", "cuda"], need: int, locked: int, machine: host.Host
) -> Decision:
    """What can be done for a model that holds `need` bytes, beside those that hold `locked`."""
    match device:
        case "cuda":
            return Refuse("MLX has no way to wire memory of CUDA devices")
        case "metal":
            if machine.macos is not None and machine.macos < LEAST_MACOS:
                return Refuse("macOS 15 is the first that can wire an application's GPU memory")
            return LimitMetal(need + locked)
        case "cpu":
            if machine.system != "Linux":
                return Refuse(f"memory is not locked on {machine.system}")
            most = int(LOCK_SHARE * host.usable_memory_bytes(machine))
            if need + locked > most:
                return Refuse(
                    f"pinned models would lock {_mib(need + locked)}; of the memory that this "
                    f"process may use {_mib(most)} can be"
                )
            return LockPages()
        case _:
            assert_never(device)


@dataclass(slots=True)
class Wiring:
    """The pinned models of one worker. `look` and the two calls are a test's to replace."""

    look: Callable[[], host.Host] = host.look
    pages: Pages = field(default_factory=lambda: SystemPages())
    set_metal_limit: Callable[[int], None] = lambda count: _set_metal_limit(count)
    _held: dict[str, tuple[int, list[Span]]] = field(default_factory=dict)
    """Bytes by model, and the pages that they lie in (none with Metal)."""
    _said: set[str] = field(default_factory=set)

    def wire(self, model_id: str, weights: Weights | None) -> Wired:
        """Lock a loaded model's weights; again is no harm."""
        if model_id in self._held:
            return Wired(model_id, self._held[model_id][0])
        if weights is None:
            return Wired(model_id, why_not="it has no weights")
        locked = sum(held for held, _ in self._held.values())
        decision = decide(weights.device, weights.held_bytes, locked, self.look())
        try:
            match decision:
                case LockPages():
                    pages = whole_pages(weights.spans())
                    self._lock(pages)
                    self._held[model_id] = sum(span.size for span in pages), pages
                case LimitMetal(count):
                    self.set_metal_limit(count)
                    self._held[model_id] = weights.held_bytes, []
                case Refuse(why):
                    return self._refused(model_id, why)
                case _:
                    assert_never(decision)
        except Exception as error:  # whatever it is, the model can be served
            return self._refused(model_id, self._explain(error, weights.held_bytes))
        return Wired(model_id, self._held[model_id][0])

    def release(self, model_id: str) -> Wired:
        """Let them be paged out again; call it before their memory is freed."""
        if model_id in self._held:
            held, pages = self._held.pop(model_id)
            if pages:
                self._unlock(pages)
            elif held:
                self.set_metal_limit(sum(count for count, _ in self._held.values()))
        return Wired(model_id)

    def _lock(self, pages: list[Span]) -> None:
        """All of them or none."""
        for done, span in enumerate(pages):
            try:
                self.pages.lock(span)
            except OSError:
                self._unlock(pages[:done])
                raise

    def _unlock(self, pages: list[Span]) -> None:
        for span in pages:
            self.pages.unlock(span)
        # Locks do not nest, and a page may hold the ends of two models' weights.
        for _, others in self._held.values():
            for span in others:
                self.pages.lock(span)

    def _explain(self, error: Exception, need: int) -> str:
        if not isinstance(error, OSError):
            return str(error) or type(error).__name__
        limit = self.pages.limit_bytes()
        of = (
            "" if limit is None else f"; RLIMIT_MEMLOCK is {_mib(limit)} (ulimit -l, LimitMEMLOCK=)"
        )
        return f"mlock of {_mib(need)}: {os.strerror(error.errno or 0)}{of}"

    def _refused(self, model_id: str, why: str) -> Wired:
        if why not in self._said:
            self._said.add(why)
            log.warning("%s is pinned; its weights are not locked in memory: %s", model_id, why)
        return Wired(model_id, why_not=why)


def whole_pages(spans: Iterable[Span]) -> list[Span]:
    """The pages that spans of memory lie in, each once."""
    merged: list[Span] = []
    for address, size in sorted(spans):
        start = address // PAGE_BYTES * PAGE_BYTES
        end = -(-(address + size) // PAGE_BYTES) * PAGE_BYTES
        if merged and start <= merged[-1].address + merged[-1].size:
            last = merged.pop()
            start, end = last.address, max(end, last.address + last.size)
        if end > start:
            merged.append(Span(start, end - start))
    return merged


class SystemPages:
    """The C library's."""

    @cached_property
    def _libc(self) -> ctypes.CDLL:
        """When something is locked for the first time."""
        libc = ctypes.CDLL(None, use_errno=True)
        for name in ("mlock", "munlock"):
            getattr(libc, name).argtypes = (ctypes.c_void_p, ctypes.c_size_t)
        _raise_soft_limit()
        return libc

    def lock(self, span: Span) -> None:
        if self._libc.mlock(span.address, span.size):
            raise OSError(ctypes.get_errno(), "mlock")

    def unlock(self, span: Span) -> None:
        self._libc.munlock(span.address, span.size)

    def limit_bytes(self) -> int | None:
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        return None if soft == resource.RLIM_INFINITY else soft


def _raise_soft_limit() -> None:
    """To what the process may set itself."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))


def _set_metal_limit(count: int) -> None:
    """Raises ValueError above what the device recommends."""
    import mlx.core as mx

    mx.set_wired_limit(count)


def _mib(count: int) -> str:
    return f"{-(-count // 2**20)} MiB"
