"""One model's files served twice in one worker, each with kernels of its own."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from mlx_serving import Engine
from mlx_serving.runtime import native

pytestmark = [
    pytest.mark.slow,
    pytest.mark.model,
    pytest.mark.skipif(not native.available(), reason=native.why()),
]

PROMPTS = ["Once upon a time", "The capital of France is", "def add(a, b):", "One, two,"]


async def answers(models: list[dict[str, Any]]) -> dict[str, list[str]]:
    """By served name, from requests for all of them at once."""
    async with Engine(models) as engine:
        for model in models:
            info = engine.gateway.model_info(model["name"])
            assert info is not None and info.kernels == model["kernels"]
        prompts = [(m["name"], p) for p in PROMPTS for m in models]
        requests = [
            engine.complete(prompt, model=name, max_tokens=24, temperature=0)
            for name, prompt in prompts
        ]
        texts: dict[str, list[str]] = {m["name"]: [] for m in models}
        for (name, _), done in zip(prompts, await asyncio.gather(*requests), strict=True):
            texts[name].append(done.text)
        return texts


async def test_each_answers_as_it_would_alone(model_dir) -> None:
    models = [{"model": str(model_dir), "name": mode, "kernels": mode} for mode in ("f32", "fast")]
    together = await answers(models)
    for model in models:
        assert await answers([model]) == {model["name"]: together[model["name"]]}
