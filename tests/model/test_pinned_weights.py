"""Pinned models' weights are locked in the worker's memory, wherever this machine lets us."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_serving import Engine
from mlx_serving.types import ServedModel

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - the condition is another process's
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("kernels", ["auto", pytest.param("off", marks=pytest.mark.slow)])
async def test_weights_are_locked_while_their_model_is_pinned(model_dir, kernels):
    async with Engine(
        str(model_dir), served_model_name=["m"], pin=["m"], kernels=kernels
    ) as engine:
        gateway = engine.gateway
        held = (await gateway.load("m"), gateway.model_info("m").held_bytes)[1]

        def shown() -> ServedModel:
            return gateway.models()[0]

        def locked_bytes() -> int:
            pid = engine.gateway.health()["workers"][0]["pid"]
            status = Path(f"/proc/{pid}/status").read_text()
            return 1024 * int(re.search(r"VmLck:\s+(\d+)", status)[1])

        await until(lambda: bool(shown().wired_bytes or shown().not_wired))
        if shown().not_wired:
            assert "mlock" in shown().not_wired and locked_bytes() == 0
            return
        # Whole pages; what the fused decoder keeps of norms beside them is kilobytes.
        assert 0.99 * held <= shown().wired_bytes == locked_bytes() < 1.1 * held
        answer = await engine.complete("Once", max_tokens=4, temperature=0)
        gateway.pin("m", False)
        await until(lambda: not shown().wired_bytes)
        assert locked_bytes() == 0
        gateway.pin("m", True)
        await until(lambda: bool(shown().wired_bytes))
        again = await engine.complete("Once", max_tokens=4, temperature=0)
        assert again.text == answer.text
        await gateway.unload("m")
        assert locked_bytes() == 0 == shown().wired_bytes
        await gateway.load("m")
        await until(lambda: locked_bytes() > 0.99 * held)
