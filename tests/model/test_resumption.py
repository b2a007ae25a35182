"""Streams of real arithmetic go on in another process with the same tokens."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from mlx_serving.clock import monotonic
from mlx_serving.types import SamplingParams
from mlx_serving.worker import port
from mlx_serving.worker.supervisor import Supervisor
from mlx_serving.worker.wire import ModelOptions
from model import zoo

GUARD_S = 240
OPTIONS = ModelOptions(kernels="off", prefill_step_size=8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A llama with random weights, on disk as the loader wants it."""
    return zoo.write("llama", tmp_path)


def requests() -> list[tuple[list[int], SamplingParams]]:
    greedy = SamplingParams(temperature=0.0, max_tokens=24)
    seeded = SamplingParams(
        temperature=0.9,
        top_p=0.95,
        seed=11,
        max_tokens=24,
        repetition_penalty=1.3,
        frequency_penalty=0.5,
        logprobs=1,
    )
    return [([3, 1, 4, 1, 5, 9, 2, 6, 5], greedy), ([2, 7, 1, 8], seeded), ([1] * 20, seeded)]


async def run(worker: Supervisor, kill: bool = False) -> tuple[list[list[int]], float]:
    """Everybody's tokens, and the seconds from the kill to the next worker's first token."""
    killed_s = recovered_s = 0.0

    async def read(stream) -> list[int]:
        nonlocal killed_s, recovered_s
        got: list[int] = []
        async for row in stream:
            got += row.token_ids
            if kill and not killed_s and len(got) >= 4:
                killed_s = monotonic()
                os.kill(worker.health()[0].pid, signal.SIGKILL)
            if killed_s and not recovered_s and worker.health()[0].restarts:
                recovered_s = monotonic() - killed_s
        return got

    streams = [worker.submit("m", ids, sampling) for ids, sampling in requests()]
    return list(await asyncio.gather(*map(read, streams))), recovered_s


async def check(path: Path) -> float:
    worker = Supervisor()
    worker.start()
    try:
        async with asyncio.timeout(GUARD_S):
            await worker.load_model("m", str(path), OPTIONS)
            calm, _ = await run(worker)
            stormy, recovered_s = await run(worker, kill=True)
            assert worker.health()[0].restarts == 1
            assert isinstance(worker.state, port.Ready)
            assert stormy == calm
            assert [len(tokens) for tokens in calm] == [24, 24, 24]
            return recovered_s
    finally:
        await worker.stop()


async def test_a_killed_worker_s_streams_go_on_with_equal_tokens(folder: Path) -> None:
    await check(folder)


@pytest.mark.slow
@pytest.mark.model
async def test_the_default_model_s_streams_go_on_with_equal_tokens(model_dir: Path) -> None:
    recovered_s = await check(model_dir)
    print(f"from the kill to the next worker's first token: {recovered_s:.1f} s")
