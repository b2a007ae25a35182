"""Nothing is left behind: memory is flat, and files and tasks are back where they were."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from contract import soak

ANSWER = "The same answer for all."
FLAT = 1.05


@pytest.mark.parametrize("requests", [500, pytest.param(100_000, marks=pytest.mark.slow)])
def test_a_soak_leaves_nothing(
    scripted: Callable[..., Path], tmp_path: Path, requests: int
) -> None:
    def question(draw: random.Random) -> soak.Question:
        return soak.Question(f"p{draw.random()}", ANSWER, ANSWER)

    with soak.serving(scripted(text=ANSWER), tmp_path) as server:
        leaves_nothing(server, question, 40, requests, measured=requests > 10_000)


@pytest.mark.slow
@pytest.mark.model
def test_a_soak_of_a_real_model_leaves_nothing(model_dir: Path, tmp_path: Path) -> None:
    prompts = [f"{i} and {i + 1} are" for i in range(20)]
    wanted = {"max_tokens": 6, "temperature": 0}
    with soak.serving(model_dir, tmp_path) as server:

        async def alone(body: dict[str, object], path: str) -> dict[str, Any]:
            async with soak.Connection(server.address) as connection:
                status, data = await connection.ask(soak.request({**body, **wanted}, path=path))
            assert status == 200, data
            (choice,) = json.loads(data)["choices"]
            return choice

        async def ask(prompt: str) -> soak.Question:
            completed = await alone({"prompt": prompt}, "/v1/completions")
            messages = [{"role": "user", "content": prompt}]
            answered = await alone({"messages": messages}, "/v1/chat/completions")
            return soak.Question(prompt, completed["text"], answered["message"]["content"])

        async def all_of_them() -> list[soak.Question]:
            return [await ask(prompt) for prompt in prompts]

        questions = asyncio.run(all_of_them())
        leaves_nothing(server, lambda draw: draw.choice(questions), 6, 5000, measured=True)


def leaves_nothing(
    server: soak.Server,
    question: Callable[[random.Random], soak.Question],
    max_tokens: int,
    requests: int,
    *,
    measured: bool,
) -> None:
    """`measured`: memory is flat, too; a few thousand cheap requests are within what an allocator keeps."""
    start = server.holdings()
    # Allocators and caches fill up at first.
    warm_up, rest = requests // 4, requests - requests // 4
    asyncio.run(soak.Soak(server.address, question, max_tokens, warm_up, seed=1).run())
    warm = server.holdings()
    done = soak.Soak(server.address, question, max_tokens, rest, seed=2)
    asyncio.run(done.run())
    assert done.outcomes.total() >= rest and len(done.outcomes) == 8

    def is_back() -> bool:
        now = server.holdings()
        return now.tasks <= start.tasks and now.gateway_files <= start.gateway_files

    soak.eventually(is_back)
    end = server.holdings()
    print(start, warm, end, sep="\n")
    assert end.worker_files <= start.worker_files
    if measured:
        assert end.gateway_bytes < warm.gateway_bytes * FLAT
        assert end.worker_bytes < warm.worker_bytes * FLAT


def test_a_thousand_connections_are_answered_right(
    scripted: Callable[..., Path], tmp_path: Path
) -> None:
    with soak.serving(scripted(text=ANSWER), tmp_path) as server:
        start = server.holdings()
        sent = [soak.request({"prompt": f"p{i}", "max_tokens": 40}) for i in range(1000)]
        answers = asyncio.run(soak.all_at_once(server.address, sent))
        assert {status for status, _ in answers} == {200}
        assert {json.loads(data)["choices"][0]["text"] for _, data in answers} == {ANSWER}
        soak.eventually(lambda: server.holdings().gateway_files <= start.gateway_files)
        assert server.holdings().tasks <= start.tasks


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize("count", [100, 1000])
def test_all_at_once_on_a_real_model(model_dir: Path, tmp_path: Path, count: int) -> None:
    """Each answer is what its prompt gets alone."""
    prompts = [f"{i} and {i + 1} are" for i in range(10)]
    sent = [
        soak.request({"prompt": prompt, "max_tokens": 8, "temperature": 0}) for prompt in prompts
    ]
    with soak.serving(model_dir, tmp_path) as server:

        async def alone() -> list[tuple[int, bytes]]:
            return [(await soak.all_at_once(server.address, [one]))[0] for one in sent]

        def texts(answers: list[tuple[int, bytes]]) -> list[str]:
            assert {status for status, _ in answers} == {200}
            return [json.loads(data)["choices"][0]["text"] for _, data in answers]

        expected = texts(asyncio.run(alone()))
        together = texts(asyncio.run(soak.all_at_once(server.address, sent * (count // 10))))
        assert together == expected * (count // 10)
