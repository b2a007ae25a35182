"""What a model answers before it is ready."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_serving import Engine, errors

SYSTEM = "You answer in one short sentence, and say so when you do not know the answer."


def chat(question: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]


async def test_the_first_request_finds_what_the_warm_up_left(scripted: Any) -> None:
    folder = str(scripted(mode="hash"))
    warm = [{"system": SYSTEM}, {"system": SYSTEM, "user": "Hi"}, "And this?"]
    models = [{"model": folder, "name": "warm", "warm_up": warm}, {"model": folder, "name": "cold"}]
    async with Engine(models) as engine:
        cached = {
            name: (await engine.chat(chat("Who?"), model=name, max_tokens=4)).usage.cached_tokens
            for name in ("warm", "cold")
        }
        assert cached["warm"] >= len(SYSTEM) - 32 and cached["cold"] == 0
        # It is done again each time that the model comes into memory.
        await engine.gateway.unload("warm")
        again = await engine.chat(chat("What?"), model="warm", max_tokens=4)
        assert again.usage.cached_tokens == cached["warm"]


async def test_a_prompt_that_cannot_be_answered_fails_the_load_and_is_named(scripted: Any) -> None:
    models = [{"model": str(scripted(context=64)), "warm_up": ["short", "x" * 100]}]
    engine = Engine(models)
    try:
        with pytest.raises(
            errors.ModelBroken, match=r"warm_up\[1\]: The prompt has .* tokens"
        ) as why:
            await engine.start()
        assert why.value.code == "warm_up_failed"
        (model,) = engine.gateway.models()
        assert (model.status, model.cause) == ("failed", "warm_up_failed")
        (worker,) = engine.gateway.health()["workers"]
        assert not worker["models"]
    finally:
        await engine.stop()


async def test_a_worker_that_takes_another_s_place_is_warmed_up_again(scripted: Any) -> None:
    models = [{"model": str(scripted(mode="hash")), "name": "m", "warm_up": [{"system": SYSTEM}]}]
    async with Engine(models) as engine:
        warming = engine._models._warming

        def worker() -> dict[str, Any]:
            (worker,) = engine.gateway.health()["workers"]
            return worker

        before = (await engine.chat(chat("Who?"), max_tokens=4)).usage.cached_tokens
        os.kill(worker()["pid"], signal.SIGKILL)
        await until(lambda: "m" in warming and warming["m"].done())
        first = warming["m"]
        assert first.exception() is None and worker()["restarts"] == 1
        engine.restart()
        await until(lambda: warming["m"] is not first and warming["m"].done())
        assert warming["m"].exception() is None
        again = (await engine.chat(chat("Why?"), max_tokens=4)).usage.cached_tokens
        assert again == before >= len(SYSTEM) - 32


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - the condition is another process's
        await asyncio.sleep(0.01)


async def test_an_embedder_is_warmed_up_too(scripted: Any) -> None:
    folder: Path = scripted()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"kind": "embedder"}))
    async with Engine([{"model": str(folder), "warm_up": ["A sentence."]}]) as engine:
        assert engine.gateway.health()["status"] == "ready"
