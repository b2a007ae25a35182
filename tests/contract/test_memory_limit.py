"""Three models that share a budget for two, in a control group whose limit is felt."""

from __future__ import annotations

import asyncio
import json
import os
import random
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import byte_vocabulary
from contract import served, soak
from model import zoo

pytestmark = [pytest.mark.slow, pytest.mark.model]

MIB = 1 << 20
EOS = zoo.VOCAB - 1
WEIGHTS_MIB = 96
LIMIT_BYTES = 500 * MIB
"""Of which models may take the default share: two of them and their rows, but not three. The rest holds the
two processes."""
CLIENTS = 8
REQUESTS = 500


@dataclass(frozen=True)
class Group:
    folder: Path

    @property
    def kills(self) -> int:
        """Processes that the kernel has killed for memory."""
        for name in ("memory.events", "memory.oom_control"):
            if (self.folder / name).exists():
                facts = dict(x.split() for x in (self.folder / name).read_text().splitlines())
                return int(facts.get("oom_kill", 0))
        raise AssertionError("neither version of control groups")

    @property
    def joining(self) -> tuple[str, ...]:
        return ("/bin/sh", "-c", f'echo $$ > {self.folder}/cgroup.procs; exec "$@"', "sh")


@pytest.fixture
def group() -> Iterator[Group]:
    """Skips where this process may not make one."""
    root = Path("/sys/fs/cgroup")
    for mount, limit in ((root / "memory", "memory.limit_in_bytes"), (root, "memory.max")):
        folder = mount / f"mlx-serving-test-{os.getpid()}"
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            (folder / limit).write_text(str(LIMIT_BYTES))
        except OSError:
            folder.rmdir()
            continue
        yield Group(folder)
        folder.rmdir()
        return
    pytest.skip("no control group with a memory limit can be made here")


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """Of real arithmetic, and different weights."""
    folders = []
    for seed, name in enumerate("abc"):
        folder = tmp_path / name
        folder.mkdir()
        zoo.write("llama", folder, seed, intermediate_size=32_000, eos_token_id=EOS)
        byte_vocabulary.write(folder, eos=EOS)
        folders.append(folder)
        size = (folder / "model.safetensors").stat().st_size / MIB
        assert abs(size - WEIGHTS_MIB) < WEIGHTS_MIB / 10, size
    return folders


Wish = tuple[str, str, int]


def wishes() -> list[Wish]:
    rng = random.Random(1)
    return [
        (rng.choice("abc"), f"p{rng.randrange(40)}", rng.randint(1, 8)) for _ in range(REQUESTS)
    ]


async def mixed(url: str) -> dict[Wish, set[str]]:
    """The answers to `wishes`, asked by clients that each ask now this model, now that one."""
    host, port = url.removeprefix("http://").split(":")
    asked = wishes()
    answers: dict[Wish, set[str]] = {wish: set() for wish in asked}

    async def client(share: list[Wish]) -> None:
        async with soak.Connection((host, int(port))) as connection:
            for model, prompt, tokens in share:
                body = {"model": model, "prompt": prompt, "max_tokens": tokens, "seed": 7}
                status, data = await connection.ask(soak.request(body))
                assert status == 200, data
                answers[model, prompt, tokens].add(json.loads(data)["choices"][0]["text"])

    await asyncio.gather(*(client(asked[i::CLIENTS]) for i in range(CLIENTS)))
    return answers


def test_three_models_in_a_control_group_that_holds_two(group: Group, models: list[Path]) -> None:
    with served.serving(models, "--memory-budget", str(1 << 30)) as url:
        alone = asyncio.run(mixed(url))
    assert {len(texts) for texts in alone.values()} == {1}
    with served.serving(models, loaded=2, under=group.joining) as url:
        assert asyncio.run(mixed(url)) == alone
        with urllib.request.urlopen(f"{url}/health") as answer:
            (worker,) = json.load(answer)["workers"]
    assert worker["restarts"] == 0
    assert group.kills == 0
