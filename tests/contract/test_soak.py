"""Nothing is left behind: memory is flat, and files and tasks are back where they were."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from contract import soak

ANSWER = "The same answer for all."
FLAT = 1.05


@pytest.mark.parametrize("requests", [500, pytest.param(100_000, marks=pytest.mark.slow)])
def test_a_soak_leaves_nothing(
    scripted: Callable[..., Path], tmp_path: Path, requests: int
) -> None:
    with soak.serving(scripted(text=ANSWER), tmp_path) as server:
        start = server.holdings()
        # Allocators and caches fill up at first.
        warm_up, rest = requests // 4, requests - requests // 4
        asyncio.run(soak.Soak(server.address, ANSWER, warm_up, seed=1).run())
        warm = server.holdings()
        done = soak.Soak(server.address, ANSWER, rest, seed=2)
        asyncio.run(done.run())
        assert done.outcomes.total() >= rest and len(done.outcomes) == 8

        def is_back() -> bool:
            now = server.holdings()
            return now.tasks <= start.tasks and now.gateway_files <= start.gateway_files

        soak.eventually(is_back)
        end = server.holdings()
        print(start, warm, end, sep="\n")
        assert end.worker_files <= start.worker_files
        if requests > 10_000:  # a few thousand are within what an allocator keeps
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
def test_a_hundred_of_a_hundred_on_a_real_model(model_dir: Path, tmp_path: Path) -> None:
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
        together = texts(asyncio.run(soak.all_at_once(server.address, sent * 10)))
        assert together == expected * 10
