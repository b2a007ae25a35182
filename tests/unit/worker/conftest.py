from __future__ import annotations

import asyncio
import functools
import importlib.util
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import uvloop

from mlx_serving.worker.breaker import BreakerPolicy
from mlx_serving.worker.process import WorkerProcess
from mlx_serving.worker.supervisor import Supervisor

FAKE = (sys.executable, "-u", str(Path(__file__).with_name("fake_worker.py")))


def pytest_asyncio_loop_factories(config, item):
    """Every asynchronous test here runs under both loops that users have."""
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


WITH_PROCESSES = ("test_growth.py", "test_life.py", "test_supervisor.py")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """What starts and kills workers is the longest here: under asyncio's own loop in the slow stage.
    What a loop may do differently is the connection's, whose tests run under both at once."""
    for item in items:
        if item.path.name in WITH_PROCESSES and "[asyncio" in item.name:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def spawn():
    """Starts the real worker process over a runner without MLX."""
    return functools.partial(WorkerProcess, FAKE)


@pytest.fixture(scope="session")
def fake():
    """The fake worker's module, for a loop in this process."""
    spec = importlib.util.spec_from_file_location("fake_worker", FAKE[-1])
    module = sys.modules["fake_worker"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
async def worker(spawn) -> AsyncIterator[Supervisor]:
    policy = BreakerPolicy(base_s=0.01, open_s=0.05, max_open_s=0.1)
    supervisor = Supervisor(spawn=spawn, policy=policy, seed=1)
    supervisor.events = []
    supervisor.on_event = supervisor.events.append
    supervisor.start()
    yield supervisor
    await supervisor.stop()
