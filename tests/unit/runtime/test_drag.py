"""A model that is made slow, beside one that is not."""

from __future__ import annotations

import math
from typing import Any

from mlx_serving import Engine
from mlx_serving.runtime.faults import Drag


def test_a_step_is_put_off_until_so_long_after_the_last_one() -> None:
    now_s = [100.0]
    drag = Drag(2.0, lambda: now_s[0])
    assert not drag.holds() and drag.rest_s == math.inf
    drag.stepped()
    now_s[0] += 0.5
    assert drag.holds() and drag.rest_s == 1.5
    now_s[0] += 1.5
    assert not drag.holds() and drag.rest_s == math.inf


def test_nothing_is_put_off_unless_it_is_asked_for() -> None:
    drag = Drag(0.0, lambda: 100.0)
    drag.stepped()
    assert not drag.holds() and drag.rest_s == math.inf


async def test_the_other_model_goes_on_while_one_is_put_off(scripted: Any) -> None:
    folder = str(scripted(mode="hash"))
    models = [
        {"model": folder, "name": "well"},
        # Nothing waits for the end of so long a time.
        {"model": folder, "name": "ill", "slow_step_ms": 60_000},
    ]
    async with Engine(models) as engine:
        stream = engine.generate("Hello", model="ill", max_tokens=64)
        assert (await anext(stream)).token_ids  # its first step is not put off
        for _ in range(3):
            answer = await engine.complete("Hello", model="well", max_tokens=64)
            assert answer.usage.completion_tokens == 64
        await stream.aclose()
    # A short one only takes its time.
    models[1]["slow_step_ms"] = 1.0
    async with Engine(models) as engine:
        answers = [await engine.complete("Hi", model=m["name"], max_tokens=32) for m in models]
        assert [answer.usage.completion_tokens for answer in answers] == [32, 32]
