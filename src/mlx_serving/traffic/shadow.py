"""Copies of requests for a variant whose answers nobody sees: they are compared, and that is all."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from mlx_serving.errors import Overloaded

log = logging.getLogger(__name__)

MAX_RUNNING = 8
"""Copies at once; what comes meanwhile is not copied, so that a slow variant holds up nothing."""


class Shadows:
    """Runs copies in the background, boundedly many. on_skip: a copy was not made, since too many run or
    the server has no room for it."""

    def __init__(self, on_skip: Callable[[], None]) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._on_skip = on_skip

    def start(self, work: Callable[[], Coroutine[Any, Any, None]], name: str) -> None:
        if len(self._tasks) >= MAX_RUNNING:
            self._on_skip()
            return
        task = asyncio.create_task(self._run(work, name), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _run(self, work: Callable[[], Coroutine[Any, Any, None]], name: str) -> None:
        try:
            await work()
        except Overloaded:
            self._on_skip()
        except Exception as error:  # a copy's failure is a finding about the variant, and no more
            log.info("%s: %s", name, error)


def disagreement(ours: Sequence[int], theirs: Sequence[int]) -> float:
    """The share of the longer answer that follows the first token in which the two differ."""
    longest = max(len(ours), len(theirs))
    if not longest:
        return 0.0
    pairs = enumerate(zip(ours, theirs, strict=False))
    same = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
    return 1.0 - same / longest
