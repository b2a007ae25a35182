"""SmolLM2 in a budget that holds a few streams: all finish as they would alone, within it."""

from __future__ import annotations

import asyncio
import gc
import re
import sys
from functools import partial
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_serving import Engine, host
from mlx_serving.runtime.backend.memory import STEP_MIN_BYTES

pytestmark = pytest.mark.model
MIB = 1 << 20
FREED = 32 * MIB
"""MLX's allocator keeps so much of what was freed."""


def forget_peak() -> int:
    """From now on the peak of the resident set is anew; returns what it is now. What MLX counts as
    allocated is no measure: rows take memory as they are written."""
    if sys.platform != "linux":
        pytest.skip("the peak of a resident set cannot be forgotten here")
    Path("/proc/self/clear_refs").write_text("5")
    return host.rss_bytes()


async def pressed(model: Path, streams: int, fitting: int) -> None:
    """`fitting` rows of one bucket fit beside the weights; each stream needs one."""
    prompts = [f"Story number {i}: once upon a time there was" for i in range(streams)]

    async def ask(engine: Engine, prompt: str) -> str:
        return (await engine.complete(prompt, max_tokens=24, temperature=0)).text

    async with Engine(str(model), supervise=False) as engine:
        info = engine.gateway.model_info(engine.gateway.default_model())
        alone = [await ask(engine, prompt) for prompt in prompts[:: max(1, streams // 4)]]
    assert info is not None
    gc.collect()
    mx.clear_cache()
    others = mx.get_active_memory()  # what earlier tests of this process still hold
    rows_bytes = fitting * 256 * info.kv_bytes_per_token
    budget = info.held_bytes + rows_bytes + STEP_MIN_BYTES + MIB
    async with Engine(
        str(model), supervise=False, memory_budget=budget, max_num_seqs=4 * fitting
    ) as engine:
        before = mx.get_active_memory() - others
        resident = forget_peak()
        answers = await asyncio.gather(*(ask(engine, prompt) for prompt in prompts))
        peak = before + host.peak_rss_bytes() - resident
    assert answers[:: max(1, streams // 4)] == alone
    assert before < budget
    assert peak <= budget + FREED, f"{peak / MIB:.0f} of {budget / MIB:.0f} MiB"


async def test_a_few_streams_of_which_fewer_fit(model_dir: Path) -> None:
    await pressed(model_dir, streams=10, fitting=4)


@pytest.mark.slow
async def test_sixty_four_streams_of_which_sixteen_fit(model_dir: Path) -> None:
    await pressed(model_dir, streams=64, fitting=16)


def steps_above(engine: Engine, rows: int) -> bool:
    """Whether there were steps of more rows, which is a bucket's bound."""
    text = engine.gateway.metrics().decode()
    pattern = r'^mlx_serving_batch_occupancy_bucket{le="([^"]+)".*} (\S+)$'
    steps = {le: float(n) for le, n in re.findall(pattern, text, re.MULTILINE)}
    return bool(steps) and steps["+Inf"] > steps[f"{rows}.0"]


async def test_nine_tenths_of_the_rows_that_fit_are_admitted(model_dir: Path) -> None:
    """What fits: rows in the whole budget beside the weights, as if a step needed nothing."""
    fitting, most = 36, 32
    assert most < 0.9 * fitting < most + 1
    async with Engine(str(model_dir), supervise=False) as engine:
        info = engine.gateway.model_info(engine.gateway.default_model())
    assert info is not None
    row_bytes = 256 * info.kv_bytes_per_token
    async with Engine(
        str(model_dir),
        supervise=False,
        memory_budget=info.held_bytes + fitting * row_bytes,
        max_num_seqs=2 * fitting,
    ) as engine:
        ask = partial(engine.complete, max_tokens=200, temperature=0, ignore_eos=True)
        asked = [asyncio.create_task(ask(f"Story {i}:")) for i in range(fitting)]
        while not steps_above(engine, most) and not any(task.done() for task in asked):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        assert steps_above(engine, most), "no step had more rows"
