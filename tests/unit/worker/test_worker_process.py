"""The real entry with the real loader, over a scripted model."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import os
import sys

import pytest

from mlx_serving import errors
from mlx_serving.types import SamplingParams
from mlx_serving.worker.inprocess import InProcessWorker
from mlx_serving.worker.process import WorkerProcess
from mlx_serving.worker.supervisor import Supervisor

WITHOUT_MLX = """
import sys
sys.modules["mlx"] = sys.modules["mlx_lm"] = sys.modules["transformers"] = None
from mlx_serving.runtime import main
main.main()
"""


@pytest.fixture
def scripted(tmp_path):
    config = {
        "model_type": "scripted",
        "vocab_size": 100,
        "eos_token_id": 0,
        "script": {"mode": "echo", "die_on": 66},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


def echo(worker, tokens):
    return worker.submit("m", tokens, SamplingParams(max_tokens=50))


async def tokens_of(stream) -> list[int]:
    return [token async for row in stream for token in row.token_ids]


@pytest.mark.parametrize("kind", ["process", "no mlx", "thread"])
async def test_a_scripted_model_is_served(scripted, kind):
    if kind == "process":
        worker = Supervisor()
    elif kind == "no mlx":
        worker = Supervisor(
            spawn=functools.partial(WorkerProcess, (sys.executable, "-c", WITHOUT_MLX))
        )
    else:
        worker = InProcessWorker()
    worker.start()
    async with asyncio.timeout(120):
        info = await worker.load_model("m", scripted)
        assert info.architecture == "scripted"
        assert await tokens_of(echo(worker, [7, 8, 9])) == [7, 8, 9, 0]
        if kind != "thread":
            with pytest.raises(errors.WorkerDied, match="SIGABRT"):
                await tokens_of(echo(worker, [66]))
            assert await tokens_of(echo(worker, [5])) == [5, 0]
        await worker.stop()


async def test_a_missing_folder_is_named(scripted):
    worker = Supervisor()
    worker.start()
    async with asyncio.timeout(120):
        with pytest.raises(errors.ModelBroken, match=r"nowhere/config\.json"):
            await worker.load_model("m", os.path.join(scripted, "nowhere"))
        await worker.stop()


async def test_without_a_backend_it_says_who_knows_what_to_install(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_bytes(b"\x02" + b"\0" * 7 + b"{}")
    worker = Supervisor(spawn=functools.partial(WorkerProcess, (sys.executable, "-c", WITHOUT_MLX)))
    worker.start()
    async with asyncio.timeout(120):
        with pytest.raises(errors.ModelBroken, match="mlx-serving doctor"):
            await worker.load_model("m", str(tmp_path))
        await worker.stop()


async def test_what_a_worker_logs_keeps_its_level(caplog):
    said = "print('WARNING a.b: no room'); print('note: this'); print('ERROR is a word')"
    with caplog.at_level(logging.INFO, "mlx_serving.worker.stderr"):
        process = WorkerProcess((sys.executable, "-c", said))
        await process.exited
        process.socket.close()
    lines = [(r.levelname, r.getMessage().partition(": ")[2]) for r in caplog.records]
    assert lines == [
        ("WARNING", "a.b: no room"),
        ("INFO", "note: this"),
        ("INFO", "ERROR is a word"),
    ]
