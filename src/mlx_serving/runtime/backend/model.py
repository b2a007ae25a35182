"""What the loader hands to the loop, for every kind of model. Imports no MLX."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import msgspec

from mlx_serving.runtime.core.disk import Scanned
from mlx_serving.runtime.core.plan import Constraint, Limits, Runner
from mlx_serving.runtime.slices import Slices
from mlx_serving.types import Grammar, ModelInfo
from mlx_serving.worker.wire import Memory

OnPhase = Callable[[Literal["loading", "compiling"], str], None]
"""Called with a phase and a detail for people, whenever loading gets on."""


class GrammarCompiler(Protocol):
    """Thread-safe."""

    def known(self, grammar: Grammar) -> Constraint | None:
        """At once, if it was compiled lately."""
        ...

    def compile(self, grammar: Grammar) -> Constraint:
        """Takes milliseconds, tens of them for large ones; what takes long of it lets other threads run.
        Raises InvalidRequest, which names what the grammar asks and cannot have."""
        ...


class Device(Protocol):
    """The memory that all models of the worker share."""

    @property
    def usable_bytes(self) -> int:
        """For weights, KV and prefixes: the budget less what a step's arithmetic needs."""
        ...

    def use(self) -> Memory:
        """What is held of it now."""
        ...

    def give_back(self) -> None:
        """Return to the system what an unloaded model has left."""
        ...


class Span(NamedTuple):
    """Of this process's memory."""

    address: int
    size: int


@dataclass(frozen=True, slots=True)
class Weights:
    """Where a model's weights lie."""

    device: Literal["cpu", "metal", "cuda"]
    held_bytes: int
    spans: Callable[[], list[Span]]
    """On the CPU; they may overlap."""


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """Weights beside a model's own, by which some of its sequences are computed."""

    info: ModelInfo
    """The model's, but for name, path and sizes."""
    tag: str
    """What the runner knows it by. It names what the weights are: another file's is another."""


def adapter_info(
    base: ModelInfo, model_id: str, path: Path, nbytes: int, load_s: float = 0.0
) -> ModelInfo:
    """Of an adapter in `path` that holds `nbytes` beside its base."""
    return msgspec.structs.replace(
        base,
        model_id=model_id,
        path=str(path),
        adapter_of=base.model_id,
        weight_bytes=nbytes,
        held_bytes=nbytes,
        kv_bytes_per_token=0,
        embedding_size=0,
        quantization=None,
        load_s=load_s,
    )


class AdapterHost(Protocol):
    """The adapters of one loaded model."""

    def load(self, model_id: str, path: Path, base: ModelInfo) -> Slices[LoadedAdapter]:
        """Raises ModelBroken, which says what does not fit the model or cannot be run."""
        ...

    def unload(self, tag: str) -> None:
        """Nothing is begun with it any more. What runs may end with it."""
        ...


@dataclass(frozen=True, slots=True)
class LoadedModel:
    info: ModelInfo
    runner: Runner
    limits: Limits
    grammars: GrammarCompiler | None = None
    on_disk: Scanned | None = None
    """Block files that earlier workers left."""
    close: Callable[[], None] = lambda: None
    """Ends the threads that the model has."""
    device: Device | None = None
    adapters: AdapterHost | None = None
    """None: it takes none."""
    weights: Weights | None = None
