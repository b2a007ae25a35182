"""The main job with the real model: a served SmolLM2, the official client, sixteen at once."""

from __future__ import annotations

import asyncio
import re

import openai
import pytest

from mlx_serving.bench import servers

pytestmark = [pytest.mark.slow, pytest.mark.model]

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
PROMPTS = [
    "One, two, three,",
    "The sky is",
    "def add(a, b):",
    "Once upon a time there was a small",
    "Paris is the capital of",
    "Water boils at one hundred degrees, and ice melts at",
    "Dear Sir or Madam,",
    "To make bread you need flour, water, salt and",
    "Q: What is 2 + 2?\nA:",
    "Monday, Tuesday, Wednesday,",
    "The quick brown fox",
    "import os\nimport",
    "My favourite colour is",
    "In 1969 the first people walked on the",
    "A haiku about rain:\n",
    "The opposite of hot is",
]


def body(i: int) -> dict:
    """Greedy and seeded, filtered and penalised, long and short: no two neighbours alike."""
    fields: dict = {"prompt": PROMPTS[i], "max_tokens": 6 + i % 5, "logprobs": 2}
    if i % 2:
        fields |= {"temperature": 0.8, "seed": 100 + i, "top_p": 0.9 if i % 3 else 1.0}
    else:
        fields |= {"temperature": 0.0}
    extra = {"ignore_eos": True}
    if i % 4 == 3:
        extra |= {"top_k": 40, "repetition_penalty": 1.2}
    return {**fields, "extra_body": extra}


@pytest.fixture(scope="module", params=["off", "auto"])
def kernels(request):
    return request.param


async def test_sixteen_at_once_equal_each_alone(model_dir, kernels):
    port = servers.free_port()
    command = servers.ours(
        str(model_dir), "--port", str(port), "--served-model-name", "m", "--kernels", kernels
    )
    async with (
        servers.running("ours", command, port=port, ready="/ready"),
        openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=600, max_retries=0
        ) as client,
    ):
        answer = await client.chat.completions.create(
            model="m", messages=QUESTION, temperature=0, max_tokens=16
        )
        assert answer.choices[0].message.content == "The capital of France is Paris."
        pieces = [
            chunk.choices[0].delta.content or ""
            async for chunk in await client.chat.completions.create(
                model="m", messages=QUESTION, temperature=0, max_tokens=16, stream=True
            )
        ]
        assert "".join(pieces) == "The capital of France is Paris." and len(pieces) > 5

        async def ask(i: int, **changes):
            done = await client.completions.create(model="m", **{**body(i), **changes})
            choice = done.choices[0]
            return choice.text, choice.logprobs.tokens, choice.logprobs.token_logprobs

        alone = [await ask(i) for i in range(16)]
        before = await occupancy(port)
        together = await asyncio.gather(*(ask(i) for i in range(16)))
        after = await occupancy(port)
        for i in range(16):
            assert together[i] == alone[i], PROMPTS[i]
        assert (after[0] - before[0]) / (after[1] - before[1]) >= 8
        assert len({(await ask(1, seed=s))[0] for s in range(4)}) > 1


async def occupancy(port: int) -> tuple[float, float]:
    """Sum and count of the batch occupancy so far."""
    from mlx_serving.bench import client

    text = (await client.get("127.0.0.1", port, "/metrics"))[1].decode()
    found = dict(re.findall(r"mlx_serving_batch_occupancy_(sum|count)\{[^}]*\} (\S+)", text))
    return float(found["sum"]), float(found["count"])
