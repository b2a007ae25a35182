"""What a model answers before it is ready."""

from __future__ import annotations

import json
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


async def test_an_embedder_is_warmed_up_too(scripted: Any) -> None:
    folder: Path = scripted()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"kind": "embedder"}))
    async with Engine([{"model": str(folder), "warm_up": ["A sentence."]}]) as engine:
        assert engine.gateway.health()["status"] == "ready"
