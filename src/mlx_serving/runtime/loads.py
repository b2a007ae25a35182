"""Loads under way: in order of asking, one at a time, in slices between two steps, so that no stream
of another model stands still for as long as a load takes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path

from mlx_serving import clock
from mlx_serving.runtime.backend.model import LoadedAdapter, LoadedModel, OnPhase
from mlx_serving.runtime.slices import Slices
from mlx_serving.worker import wire

Loader = Callable[[str, Path, wire.ModelOptions, OnPhase], Slices[LoadedModel]]
"""`backend.loader.loading`, or a test's own."""

Begin = Callable[[wire.LoadModel], Slices[LoadedModel | LoadedAdapter]]

SLICE_S = 0.02
"""A load is interrupted about so often; what it cannot interrupt takes longer."""


class Loads:
    def __init__(self, begin: Begin, now: clock.Clock) -> None:
        self._begin = begin
        self._now = now
        self._waiting: deque[wire.LoadModel] = deque()
        self._held: dict[int, wire.Submit] = {}
        """By seq_id: sequences of models that are not there yet."""
        self._slices: Slices[LoadedModel | LoadedAdapter] | None = None

    def __len__(self) -> int:
        """Those that have not ended."""
        return len(self._waiting)

    def ask(self, message: wire.LoadModel) -> None:
        if all(message.model_id != waiting.model_id for waiting in self._waiting):
            self._waiting.append(message)

    def hold(self, request: wire.Submit) -> bool:
        """Keep a sequence until its model is loaded. False: nobody is loading that."""
        expected = any(request.model_id == waiting.model_id for waiting in self._waiting)
        if expected:
            self._held[request.seq_id] = request
        return expected

    def forget(self, seq_id: int) -> None:
        self._held.pop(seq_id, None)

    def held(self, model_id: str) -> list[wire.Submit]:
        """The sequences that have waited for a model; they are the caller's now."""
        found = [request for request in self._held.values() if request.model_id == model_id]
        for request in found:
            del self._held[request.seq_id]
        return found

    def drop(self, model_id: str) -> list[str]:
        """Give up the loads of a model and of its adapters; the names of those that there were."""
        dropped = [
            message
            for message in self._waiting
            if model_id in (message.model_id, message.options.adapter_of)
        ]
        for message in dropped:
            if message is self._waiting[0] and self._slices is not None:
                self._slices.close()
                self._slices = None
            self._waiting.remove(message)
        return [message.model_id for message in dropped]

    @property
    def first(self) -> wire.LoadModel:
        return self._waiting[0]

    def advance(self) -> LoadedModel | LoadedAdapter | None:
        """Some slices of the first load; the model once it is loaded. Raises what the load raises; it
        has then ended."""
        until_s = self._now() + SLICE_S
        message = self._waiting[0]
        try:
            if self._slices is None:
                self._slices = self._begin(message)
            while self._now() < until_s:
                next(self._slices)
        except StopIteration as ended:
            self._end()
            loaded: LoadedModel | LoadedAdapter = ended.value
            return loaded
        except BaseException:
            self._end()
            raise
        return None

    def _end(self) -> None:
        self._waiting.popleft()
        self._slices = None
