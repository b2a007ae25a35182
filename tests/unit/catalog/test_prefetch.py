"""Which model comes next, and reading its files before it is asked for."""

from __future__ import annotations

import asyncio
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from mlx_serving.catalog.lifecycle import Absent, Ready
from mlx_serving.catalog.prefetch import PIECE_BYTES, Prefetch, read_ahead
from mlx_serving.catalog.succession import Guess, Succession
from mlx_serving.telemetry.events import Event, ModelLoaded, ModelLoading, RequestStarted
from mlx_serving.types import ModelInfo


@pytest.mark.parametrize(
    ("requests", "guess"),
    [
        ("", None),
        ("a", None),
        ("aaaa", None),
        ("aba", None),  # once is no habit
        ("ababa", Guess("b", 1.0)),
        ("aabbaabbbaa", Guess("b", 1.0)),  # a run counts as one
        ("ababac", None),  # nothing is known of what follows c
        ("abcabcab", Guess("c", 1.0)),
        ("abababacacacaca", Guess("c", 0.75)),  # what is new outweighs what was
    ],
)
def test_what_comes_next(requests: str, guess: Guess | None) -> None:
    table = Succession()
    for model_id in requests:
        table.observe(model_id)
    got = table.guess()
    if guess is None:
        assert got is None
    else:
        assert got is not None and got.model_id == guess.model_id
        assert got.confidence == pytest.approx(guess.confidence, abs=0.05)


@dataclass
class FakeSlot:
    model_id: str
    state: Any
    starts: int = 0

    def start(self, *, asked: bool) -> asyncio.Task[None]:
        assert not asked
        self.starts += 1
        self.state = Ready(None)
        return asyncio.create_task(asyncio.sleep(0))


class FakeResidency:
    """Has room, or has not; and says for whom it was asked, and who was spared."""

    def __init__(self, room: bool) -> None:
        self._room = room
        self.asked: list[tuple[str, str]] = []

    async def clear_for(self, slot: FakeSlot, spared: str) -> bool:
        self.asked.append((slot.model_id, spared))
        return self._room


class Listening:
    """A `Prefetch` over the models a, b and c, of which those in `absent` are not in memory."""

    def __init__(
        self, tmp_path: Path, absent: str, threshold: float = 0.7, *, room: bool = False
    ) -> None:
        self.slots = {m: FakeSlot(m, Absent() if m in absent else Ready(None)) for m in "abc"}
        self.residency = FakeResidency(room)
        self.outcomes: list[str] = []
        slots, residency = cast(Any, self.slots), cast(Any, self.residency)
        self.prefetch = Prefetch(slots, residency, threshold, self.outcomes.append)
        for m in "abc":
            self.prefetch.hear(ModelLoaded(model_id=m, info=info(m, tmp_path)))

    def requests(self, names: str) -> None:
        for name in names:
            self.hear(RequestStarted(request_id="r", model_id=name, prompt_tokens=1))

    def hear(self, event: Event) -> None:
        self.prefetch.hear(event)


def info(model_id: str, path: Path) -> ModelInfo:
    return ModelInfo(
        model_id=model_id,
        path=str(path),
        architecture="llama",
        context_length=8,
        vocab_size=8,
        eos_token_ids=(),
        quantization=None,
        dtype="float32",
        weight_bytes=1,
        held_bytes=1,
        kv_bytes_per_token=1,
        load_s=1.0,
    )


async def test_a_likely_model_is_read_once_and_its_load_is_a_hit(tmp_path: Path) -> None:
    all_ = Listening(tmp_path, absent="b")
    all_.requests("ababa")
    assert all_.outcomes == ["begun"]
    all_.requests("aaa")
    assert all_.outcomes == ["begun"]
    all_.hear(ModelLoading(model_id="b"))
    all_.hear(ModelLoading(model_id="c"))
    all_.hear(ModelLoading(model_id="b"))
    assert all_.outcomes == ["begun", "hit", "miss", "miss"]
    await all_.prefetch.close()


async def test_a_likely_model_is_loaded_where_there_is_room(tmp_path: Path) -> None:
    all_ = Listening(tmp_path, absent="b", room=True)
    all_.requests("ababa")
    assert all_.outcomes == ["begun"]
    while not all_.slots["b"].starts:
        await asyncio.sleep(0)
        all_.hear(ModelLoading(model_id="b"))
    assert all_.residency.asked == [("b", "a")]
    all_.requests("ab")
    assert all_.outcomes == ["begun", "hit"]
    all_.requests("bab")
    assert all_.outcomes == ["begun", "hit"] and all_.slots["b"].starts == 1
    await all_.prefetch.close()


async def test_a_threshold_of_0_is_never(tmp_path: Path) -> None:
    never = Listening(tmp_path, absent="b", threshold=0.0)
    never.requests("ababa")
    assert never.outcomes == []
    never.prefetch.threshold = 0.7
    never.requests("a")
    assert never.outcomes == ["begun"]
    await never.prefetch.close()


async def test_no_model_is_read_that_is_in_memory_or_unlikely(tmp_path: Path) -> None:
    resident = Listening(tmp_path, absent="c")
    resident.requests("ababa")
    unlikely = Listening(tmp_path, absent="abc", threshold=0.99)
    unlikely.requests("abacabaca")
    assert resident.outcomes == unlikely.outcomes == []


async def test_one_model_is_read_at_a_time(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    os.mkfifo(weights)  # opening it waits for somebody who writes
    three = Listening(tmp_path, absent="abc")
    three.requests("ababa")
    three.requests("cacaca")
    assert three.outcomes == ["begun"]
    writer = asyncio.to_thread(lambda: weights.open("wb").close())
    await asyncio.gather(writer, three.prefetch.close())


def test_every_byte_of_the_weights_is_read(tmp_path: Path) -> None:
    sizes = (PIECE_BYTES + 5, 7)
    for i, size in enumerate(sizes):
        with (tmp_path / f"model-{i}.safetensors").open("wb") as file:
            file.truncate(size)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert read_ahead(tmp_path, threading.Event()) == sum(sizes)
    stopped = threading.Event()
    stopped.set()
    assert read_ahead(tmp_path, stopped) == 0


def test_a_file_that_cannot_be_read_is_left_to_the_load(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "nowhere")
    assert read_ahead(tmp_path, threading.Event()) == 0
