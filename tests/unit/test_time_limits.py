"""Time limits over a real worker: who is too late is told so, and nobody else is."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_serving import Engine, errors


async def test_a_request_that_waits_for_too_long_is_told_to_come_back(scripted: Any) -> None:
    model = scripted(step_delay_ms=20)
    async with Engine(str(model), max_num_seqs=1, queue_timeout_s=0.2) as engine:
        running = engine.generate("first", max_tokens=400, ignore_eos=True)
        await anext(running)
        with pytest.raises(errors.Overloaded) as late:
            await engine.complete("second", max_tokens=2)
        assert (late.value.code, late.value.retry_after_s) == ("queue_timeout", 5.0)
        assert (await anext(running)).token_ids, "who was begun goes on"
        await running.aclose()
        assert (await engine.complete("third", max_tokens=2)).usage.completion_tokens


async def test_a_first_token_that_does_not_come(scripted: Any) -> None:
    model = scripted(step_delay_ms=3000)
    async with Engine(str(model), first_token_timeout_s=0.2) as engine:
        with pytest.raises(errors.TimedOut, match="no token"):
            await engine.complete("x", max_tokens=2)
        assert 'outcome="timed_out"' in engine.metrics.render().decode()


@pytest.mark.parametrize("n", [1, 3])
async def test_a_request_that_takes_too_long_altogether(scripted: Any, n: int) -> None:
    model = scripted(step_delay_ms=20, context=100_000)
    async with Engine(str(model), request_timeout_s=1.0) as engine:
        chunks = []
        with pytest.raises(errors.TimedOut, match="over 1 s"):
            async for chunk in engine.generate("x", max_tokens=90_000, ignore_eos=True, n=n):
                chunks.append(chunk)  # noqa: PERF401
        assert chunks, "what was there has been delivered"
        assert engine.gateway.health()["open_requests"] == 0


async def test_a_prompt_that_cannot_fit_is_not_tokenised(scripted: Any) -> None:
    async with Engine(str(scripted(context=512))) as engine:
        with pytest.raises(errors.ContextOverflow) as over:
            await engine.complete("x" * 40_000_000)
        assert over.value.param == "prompt"
