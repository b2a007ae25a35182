"""Adapters in the loop: loaded and let go beside their model, whose sequences go on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import pytest

from mlx_serving.errors import ModelBroken
from mlx_serving.runtime.backend.model import LoadedAdapter
from mlx_serving.runtime.slices import Slices
from mlx_serving.types import ModelInfo
from mlx_serving.worker import wire
from unit.runtime.test_loop import Parent, load, loaded, serving, submit


@dataclass
class Host:
    loaded: list[str] = field(default_factory=list)

    def load(self, model_id: str, path: Path, base: ModelInfo) -> Slices[LoadedAdapter]:
        yield
        if path.name == "broken":
            raise ModelBroken("its shapes are another model's")
        self.loaded.append(f"{model_id}@1")
        info = msgspec.structs.replace(base, model_id=model_id, adapter_of=base.model_id)
        return LoadedAdapter(info, f"{model_id}@1")

    def unload(self, tag: str) -> None:
        self.loaded.remove(tag)


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def parent(host: Host) -> Iterator[Parent]:
    def begin(model_id, path, options, on_phase):
        yield
        taken = None if path.name == "vectors" else host
        return replace(loaded(model_id), adapters=taken)

    with serving(begin) as parent:
        yield parent


def adapter(name: str = "m+a", path: str = "any", of: str = "m") -> wire.LoadModel:
    return load(name, path, adapter_of=of)


def test_it_answers_under_its_own_name(parent: Parent) -> None:
    parent.send(load(), adapter(), submit(1, 10), submit(2, 20, model_id="m+a"))
    rows = parent.rows(2)
    assert rows[2].token_ids == [21, 22, 23, 24] and rows[1].error is None
    parent.send(adapter())
    told = parent.expect(wire.ModelLoaded, lambda m: m.info.model_id == "m+a")
    assert told.info.adapter_of == "m"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ((load(), adapter(path="broken")), "its shapes are another model's"),
        ((adapter(),), "model 'm' is not loaded"),
        ((load(path="vectors"), adapter()), "'m' takes no adapters: it writes no text"),
    ],
)
def test_one_that_cannot_be_loaded_is_told(
    parent: Parent, messages: tuple[wire.ToWorker, ...], reason: str
) -> None:
    parent.send(*messages, submit(1, 10, model_id="m+a"))
    assert parent.expect(wire.ModelFailed).message == reason
    error = parent.rows(1)[1].error
    assert error is not None and error[1] == reason


def test_letting_it_go_ends_its_sequences_only(parent: Parent, host: Host) -> None:
    parent.send(load(), adapter(), adapter("m+b"))
    parent.send(
        *(submit(i, 10, model_id=m, max_tokens=5000) for i, m in enumerate(("m", "m+a", "m+b")))
    )
    seen: set[int] = set()
    while len(seen) < 3:
        seen |= {row.seq_id for row in parent.expect(wire.Step).rows}
    parent.send(wire.UnloadModel("m+a"))
    assert parent.rows(1)[1].error == ("model_not_found", "model 'm+a' was unloaded")
    assert parent.expect(wire.ModelUnloaded).model_id == "m+a"
    assert host.loaded == ["m+b@1"]
    parent.send(submit(4, 10, model_id="m+a"))
    assert parent.rows(1)[4].error == ("model_not_found", "model 'm+a' is not loaded")
    seen = set()
    while seen < {0, 2}:
        seen |= {row.seq_id for row in parent.expect(wire.Step).rows}


def test_it_goes_with_its_model(parent: Parent) -> None:
    parent.send(load(), adapter(), submit(1, 10, model_id="m+a", max_tokens=5000))
    parent.expect(wire.Step)
    parent.send(wire.UnloadModel("m"))
    assert parent.rows(1)[1].error == ("model_not_found", "model 'm' was unloaded")
    assert [parent.expect(wire.ModelUnloaded).model_id for _ in range(2)] == ["m+a", "m"]
    parent.send(submit(2, 10, model_id="m+a"))
    assert parent.rows(1)[2].error == ("model_not_found", "model 'm+a' is not loaded")


def test_its_load_is_given_up_with_its_model(parent: Parent) -> None:
    parent.send(load(), adapter(), adapter("m+b"), wire.UnloadModel("m"))
    failed = {parent.expect(wire.ModelFailed).model_id for _ in range(3)}
    assert failed == {"m", "m+a", "m+b"}
