from __future__ import annotations

import asyncio

import pytest

from mlx_serving.errors import DeadlineExceeded, Overloaded
from mlx_serving.traffic.deadlines import within


async def test_what_never_comes_is_given_up() -> None:
    with pytest.raises(DeadlineExceeded) as caught:
        async with within(0.01):
            await asyncio.Event().wait()
    assert caught.value.param == "timeout" and "0.01 s" in caught.value.message


@pytest.mark.parametrize("timeout_s", [None, 3600.0])
async def test_what_comes_in_time_is_left_alone(timeout_s) -> None:
    async with within(timeout_s):
        await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        async with within(timeout_s):
            raise Overloaded("full")
