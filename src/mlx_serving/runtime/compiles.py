"""Grammars that are compiled on threads while the sequences that need them queue.

    ask ─▶ a thread: compile ─▶ ring ─▶ take, by the loop

The library lets go of the interpreter while it compiles, so the steps of running streams go on. What
it may take is bounded in `backend.grammar`. All but the compiling happens on the loop's thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from mlx_serving.runtime.backend.model import GrammarCompiler
from mlx_serving.runtime.core.plan import Constraint
from mlx_serving.types import Grammar

THREADS = 2
"""A small grammar is not held up by one large one, and the steps keep the other cores."""

_Key = tuple[GrammarCompiler, Grammar]


class Compiled(NamedTuple):
    seq_id: int
    outcome: Constraint | BaseException


@dataclass(slots=True)
class _Job:
    future: Future[Constraint]
    seq_ids: dict[int, None] = field(default_factory=dict)
    """Those that wait for it, in order."""


class Compiles:
    """A worker's. Who asks for what is being compiled already waits for that; what nobody waits for any
    more is not begun. `ring` is called, on any thread, when there is something to take."""

    def __init__(self, ring: Callable[[], None]) -> None:
        self._ring = ring
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="grammar")
        self._jobs: dict[_Key, _Job] = {}
        self._keys: dict[int, _Key] = {}
        """Of the sequences that wait."""
        self._ended: deque[_Key] = deque()

    def __len__(self) -> int:
        """Sequences that wait."""
        return len(self._keys)

    def ask(self, seq_id: int, compiler: GrammarCompiler, grammar: Grammar) -> None:
        key = self._keys[seq_id] = (compiler, grammar)
        job = self._jobs.get(key)
        if job is None:
            job = self._jobs[key] = _Job(self._pool.submit(compiler.compile, grammar))
            job.future.add_done_callback(partial(self._note, key))
        job.seq_ids[seq_id] = None

    def forget(self, seq_id: int) -> None:
        """It has ended, or has what it waited for."""
        key = self._keys.pop(seq_id, None)
        if key is None:
            return
        job = self._jobs[key]
        del job.seq_ids[seq_id]
        if not job.seq_ids and job.future.cancel():
            del self._jobs[key]

    def take(self) -> list[Compiled]:
        """What was compiled since the last time, for each sequence that waited."""
        found = []
        while self._ended:
            job = self._jobs.pop(self._ended.popleft())
            outcome = job.future.exception() or job.future.result()
            for seq_id in job.seq_ids:
                del self._keys[seq_id]
                found.append(Compiled(seq_id, outcome))
        return found

    def close(self) -> None:
        """What has begun goes on to its end."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _note(self, key: _Key, future: Future[Constraint]) -> None:
        if not future.cancelled():
            self._ended.append(key)
            self._ring()
