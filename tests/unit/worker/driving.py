"""Sequences on a supervisor over `fake_worker.py`, and what their tests wait for."""

from __future__ import annotations

import asyncio
import os

from mlx_serving.types import SamplingParams

RAISE, ABORT, HANG = 901, 902, 903  # as fake_worker.py has them
FOREVER = 90_000


def submit(worker, start=1000, max_tokens=8, model="m"):
    return worker.submit(model, [start], SamplingParams(max_tokens=max_tokens, ignore_eos=True))


async def tokens_of(stream) -> list[int]:
    return [token async for row in stream for token in row.token_ids]


async def read(stream, into: list[int]) -> None:
    async for row in stream:
        into += row.token_ids


async def until(condition) -> None:
    while not condition():  # noqa: ASYNC110 - the condition is another process's
        await asyncio.sleep(0.005)


def alive(pid: int) -> bool:
    """False once reaped: a zombie still answers."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
