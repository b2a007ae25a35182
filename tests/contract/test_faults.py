"""What is promised when things break, tested by breaking them: real worker processes.

docs/operations.md names these tests.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal

import pytest

from mlx_serving import Engine, errors
from mlx_serving.telemetry import events

POISON = 200
"""No text of the tests has this byte."""


def worker_of(engine) -> dict:
    return engine.gateway.health()["workers"][0]


async def until(condition) -> None:
    while not condition():  # noqa: ASYNC110 - the condition is another process's
        await asyncio.sleep(0.01)


SCHEMA = {
    "name": "numbers",
    "schema": {"type": "array", "items": {"type": "integer"}, "minItems": 30},
}
REQUESTS = [
    {"prompt": f"request {i}", "max_tokens": 60 + i, **how}
    for i, how in enumerate(
        [
            {"temperature": 0},
            {"temperature": 1.0, "seed": 7},
            {"temperature": 0.7, "seed": 8, "n": 3},
            {"temperature": 1.0, "seed": 9, "logprobs": 2, "stop": ("zz",)},
            {"temperature": 0, "response_format": {"type": "json_schema", "json_schema": SCHEMA}},
            {"temperature": 1.0, "seed": 10, "grammar": "start: /[a-z]{50,200}/"},
            {"temperature": 1.0, "seed": 11, "frequency_penalty": 0.5, "min_tokens": 9},
            {"temperature": 0, "n": 2},
        ]
        * 2
    )
]


class Reader:
    """One client: what it got of each choice."""

    def __init__(self, engine, prompt, **params):
        self.got: dict[int, list[int]] = {}
        self.logprobs = 0
        self.finished: dict[int, str] = {}
        self.task = asyncio.create_task(self._read(engine.generate(prompt, **params)))

    async def _read(self, chunks):
        async for chunk in chunks:
            self.got.setdefault(chunk.choice, []).extend(chunk.token_ids)
            self.logprobs += len(chunk.logprobs or ())
            if chunk.finish_reason:
                assert chunk.choice not in self.finished
                self.finished[chunk.choice] = chunk.finish_reason

    @property
    def tokens(self) -> int:
        return sum(map(len, self.got.values()))


async def run(engine, on_tokens=None) -> list[Reader]:
    """All at once, to their ends; `on_tokens` is called with the number of tokens so far."""
    readers = [Reader(engine, **request) for request in REQUESTS]
    tasks = [reader.task for reader in readers]
    while on_tokens is not None and not all(task.done() for task in tasks):
        await on_tokens(sum(reader.tokens for reader in readers))
        await asyncio.sleep(0.01)
    await asyncio.gather(*tasks)
    return readers


@pytest.mark.parametrize("seed", [1, 2])
async def test_sixteen_streams_survive_kills_and_a_stop(scripted, seed):
    model = scripted(mode="hash", step_delay_ms=4)
    settings = {"silence_timeout_s": 5.0, "max_num_seqs": 16}
    async with Engine(str(model), **settings) as engine:
        calm = await run(engine)
        total = sum(reader.tokens for reader in calm)
        rng = random.Random(seed)
        faults = [signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP]
        rng.shuffle(faults)
        at = sorted(rng.randrange(1, total - 200) for _ in faults)

        async def disturb(tokens):
            worker = worker_of(engine)
            if faults and tokens >= at[0] and worker["state"] == "ready":
                at.pop(0)
                os.kill(worker["pid"], faults.pop(0))
                await until(lambda: worker_of(engine)["pid"] != worker["pid"])

        stormy = await run(engine, disturb)
        assert faults == []
        assert worker_of(engine)["restarts"] >= 4
        health = engine.gateway.health()
        assert (health["status"], health["open_requests"]) == ("ready", 0)
        outcomes = engine.metrics.render().decode()
    assert all(ord("a") <= token <= ord("z") for token in calm[5].got[0][:50])  # its grammar
    for one, other in zip(calm, stormy, strict=True):
        assert one.got == other.got
        assert (one.finished, one.logprobs) == (other.finished, other.logprobs)
    assert "worker_died" not in outcomes


async def test_a_poison_request_fails_alone(scripted):
    model = scripted(mode="hash", step_delay_ms=2, die_on=POISON)
    async with Engine(str(model)) as engine:
        calm = await run(engine)
        poison = asyncio.create_task(engine.complete([1, POISON], max_tokens=5))
        stormy = await run(engine)
        with pytest.raises(errors.WorkerDied, match="given up: 3 workers in a row died"):
            await poison
        assert [r.got for r in calm] == [r.got for r in stormy]
        # A death noticed by a failed write may lose the worker's last words about who had begun: it
        # then has no suspect, and one more is needed.
        assert worker_of(engine)["restarts"] in (3, 4)
        assert (await engine.complete("next", max_tokens=3)).usage.completion_tokens == 3


async def test_a_request_that_hangs_its_step_fails_alone(scripted):
    model = scripted(mode="hash", step_delay_ms=2, hang_on=POISON)
    settings = {"step_timeout_s": 2.0, "max_request_deaths": 2}
    async with Engine(str(model), **settings) as engine:
        calm = await engine.complete("calm", max_tokens=100, temperature=0)
        stormy = asyncio.create_task(engine.complete("calm", max_tokens=100, temperature=0))
        with pytest.raises(errors.WorkerDied, match="a step took longer than 2 s"):
            await engine.complete([1, POISON], max_tokens=5)
        assert (await stormy).answers == calm.answers


async def test_restart_drops_no_stream(scripted):
    model = scripted(mode="hash", step_delay_ms=4)
    async with Engine(str(model)) as engine:
        calm = await run(engine)
        asked = []

        async def disturb(tokens):
            if tokens > 100 and not asked:
                asked.append(worker_of(engine)["pid"])
                engine.restart()

        stormy = await run(engine, disturb)
        assert [r.got for r in calm] == [r.got for r in stormy]
        assert worker_of(engine)["pid"] != asked[0]
        assert worker_of(engine)["restarts"] == 1


async def test_a_model_that_kills_its_loads_is_quarantined_and_the_other_goes_on(scripted):
    good, bad = scripted("good", text="fine"), scripted("bad", text="x", die_on_load=True)
    engine = Engine([str(good), str(bad)])
    failed: list[events.ModelFailed] = []
    engine.on(events.ModelFailed, failed.append)
    try:
        await engine.start(wait_ready=False)
        assert (await engine.complete("x", max_tokens=9)).text == "fine"
        with pytest.raises(errors.ModelBroken, match=r"(?s)'bad' is quarantined.*SIGABRT"):
            await engine.complete("x", model="bad")
        assert (await engine.complete("x", max_tokens=9)).text == "fine"
        health = engine.gateway.health()
        assert health["status"] == "degraded"
        assert any("'bad' is quarantined" in reason for reason in health["reasons"])
        assert {m.id: m.status for m in engine.gateway.models()} == {
            "good": "ready",
            "bad": "failed",
        }
    finally:
        await engine.stop()
    assert {event.model_id for event in failed} == {"bad"}


async def test_a_loaded_model_that_breaks_is_shown_and_refused(scripted):
    model = scripted(text="fine")
    async with Engine(str(model)) as engine:
        (model / "config.json").write_text("{")
        engine.restart()
        await until(lambda: worker_of(engine)["restarts"] == 1)
        with pytest.raises(errors.ModelBroken, match=r"config\.json"):
            await engine.complete("x")
        assert engine.gateway.health()["status"] == "degraded"
        (shown,) = engine.gateway.models()
        assert shown.status == "failed" and "config.json" in (shown.reason or "")


async def test_without_a_supervisor_nothing_is_restarted(scripted):
    async with Engine(str(scripted(text="x", step_delay_ms=50)), supervise=False) as engine:
        assert (await engine.complete("x", max_tokens=2)).text == "x"
        engine.restart()
        assert (await engine.complete("x", max_tokens=2)).text == "x"
        assert worker_of(engine)["restarts"] == 0
