"""The synchronous twin: what a notebook does to it."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mlx_serving import SyncEngine, errors

ENDLESS: dict[str, Any] = {"mode": "cycle", "token_ids": [97], "step_delay_ms": 20}


@pytest.fixture
def ctrl_c() -> Iterator[Callable[[SyncEngine], None]]:
    """Interrupts this thread once the engine has a request open. (Test runners ignore SIGINT.)"""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    main = threading.get_ident()

    def interrupt(engine: SyncEngine) -> None:
        def watch() -> None:
            while not engine.engine.gateway.health()["open_requests"]:
                time.sleep(0.005)
            signal.pthread_kill(main, signal.SIGINT)

        threading.Thread(target=watch, daemon=True).start()

    yield interrupt
    signal.signal(signal.SIGINT, before)


def test_an_interrupted_call_does_not_go_on(scripted, ctrl_c):
    with SyncEngine(str(scripted(**ENDLESS))) as engine:
        ctrl_c(engine)
        with pytest.raises(KeyboardInterrupt):
            engine.complete("x", max_tokens=8000)
        assert engine.engine.gateway.health()["open_requests"] == 0
        assert engine.complete("x", max_tokens=2).text == "aa"


def test_an_interrupted_stream_does_not_go_on(scripted, ctrl_c):
    with SyncEngine(str(scripted(**ENDLESS))) as engine:
        ctrl_c(engine)
        with (
            pytest.raises(KeyboardInterrupt),
            contextlib.closing(engine.generate("x", max_tokens=8000)) as chunks,
        ):
            for _ in chunks:
                pass
        assert engine.engine.gateway.health()["open_requests"] == 0


def test_started_twice_and_started_anew(scripted):
    engine = SyncEngine(str(scripted(text="Hi.")))
    with engine.start():
        assert engine.complete("x").text == "Hi."
    engine.close()
    with pytest.raises(errors.Draining, match="not started"):
        engine.complete("x")
    with engine:
        assert engine.complete("x").text == "Hi."
