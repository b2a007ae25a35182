"""Forced tokens over a real worker: the same answers with and without `jump_forward`, whatever else is
asked for, and as many tokens counted."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import jsonschema
import openai

from mlx_serving import Engine
from mlx_serving.api.app import create_app

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "description": {"type": "string", "maxLength": 6},
        "telephone_number": {"type": "string", "pattern": "^555-[0-9]{4}$"},
        "category": {"enum": ["catalogue", "category"]},
    },
    "required": ["description", "telephone_number", "category"],
    "additionalProperties": False,
}
OBJECT = {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}}


@asynccontextmanager
async def client_of(engine: Engine) -> AsyncIterator[openai.AsyncOpenAI]:
    transport = httpx.ASGITransport(create_app(engine.gateway))
    async with httpx.AsyncClient(transport=transport) as http:
        yield openai.AsyncOpenAI(
            base_url="http://test/v1", api_key="x", http_client=http, max_retries=0
        )


def wish(i: int) -> dict[str, Any]:
    return {
        "model": "scripted",
        "prompt": f"Hi {i}",
        "seed": i,
        "max_tokens": 300,
        **[
            {"extra_body": OBJECT},
            # What ends an answer stands in the middle of a run.
            {"extra_body": OBJECT, "stop": ["phone_n"]},
            {"extra_body": OBJECT, "stop": ["scrip"], "n": 2},
            {"extra_body": OBJECT, "max_tokens": 9},
            {"extra_body": {**OBJECT, "stop_token_ids": [ord("h")]}},
            {"extra_body": {**OBJECT, "min_tokens": 250}, "presence_penalty": 1.0},
            {"extra_body": OBJECT, "logprobs": 1},
            {"max_tokens": 20},
        ][i % 8],
    }


def told(answer: Any) -> Any:
    choices = [(c.text, c.finish_reason) for c in answer.choices]
    return choices, answer.usage.completion_tokens


async def streamed(client: openai.AsyncOpenAI, i: int, begun: asyncio.Event | None = None) -> Any:
    """What `told` tells, put together from a stream."""
    texts: dict[int, str] = {}
    ends: dict[int, str] = {}
    options = {"include_usage": True}
    stream = await client.completions.create(stream=True, stream_options=options, **wish(i))  # type: ignore[call-overload]
    async for chunk in stream:
        if begun is not None:
            begun.set()
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            ends[choice.index] = choice.finish_reason or ends.get(choice.index, "")
        usage = chunk.usage
    return [(texts[i], ends[i]) for i in sorted(texts)], usage.completion_tokens


async def test_answers_and_counts_are_the_same(scripted: Any) -> None:
    folder = str(scripted(mode="hash"))
    found = {}
    for setting in ("off", "on"):
        async with Engine(folder, jump_forward=setting) as engine, client_of(engine) as client:
            answers = await asyncio.gather(
                *(client.completions.create(**wish(i)) for i in range(16))
            )
            found[setting] = [told(answer) for answer in answers]
            assert [await streamed(client, i) for i in range(8)] == found[setting][:8]
            page = engine.metrics.render().decode()
            assert ("mlx_serving_forced_tokens_total{" in page) == (setting == "on")
    assert found["on"] == found["off"]
    for i in (0, 8):
        ((text, reason),), _ = found["on"][i]
        jsonschema.validate(json.loads(text), SCHEMA)
        assert reason == "stop"
    ((text, reason),), tokens = found["on"][3]
    assert (reason, tokens) == ("length", 9)


async def test_readers_of_one_sequence_get_its_runs(scripted: Any) -> None:
    async with (
        Engine(str(scripted(mode="hash", step_delay_ms=2)), coalesce="deterministic") as engine,
        client_of(engine) as client,
    ):
        alike = await asyncio.gather(*(client.completions.create(**wish(0)) for _ in range(4)))
        assert len({str(told(answer)) for answer in alike}) == 1


async def test_a_run_survives_a_workers_death(scripted: Any) -> None:
    folder = str(scripted(mode="hash", step_delay_ms=2))
    async with Engine(folder) as engine, client_of(engine) as client:
        wanted = [told(await client.completions.create(**wish(i))) for i in range(4)]
        begun = asyncio.Event()
        asked = [asyncio.create_task(streamed(client, i, begun)) for i in range(4)]
        await begun.wait()
        os.kill(engine.gateway.health()["workers"][0]["pid"], signal.SIGKILL)
        assert [await task for task in asked] == wanted
