"""The worker's whole life: inbox → step → outbox.

    receive ─▶ obey (load, submit, cancel, …) ─▶ step each model in turn ─▶ one Step frame each
       ▲                                                                         │
       └───────────── blocks here when no model has anything to do ◀─────────────┘

One thread does all of it: while there is work, the socket is only polled between steps; when
there is none, the thread sleeps in it, so that an idle worker uses no CPU and the kernel
wakes it directly. Loads happen in slices between steps (`loads`), and `Phase` frames say so. Grammars
are compiled on threads (`compiles`), which ring when they are done.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import assert_never

from mlx_serving import clock, errors, host
from mlx_serving.runtime.backend.model import Device, LoadedAdapter, LoadedModel
from mlx_serving.runtime.collector import Collector
from mlx_serving.runtime.compiles import Compiles
from mlx_serving.runtime.core.memory import lacks, share
from mlx_serving.runtime.line import Line
from mlx_serving.runtime.link import Link, Pulse
from mlx_serving.runtime.loads import Loader, Loads
from mlx_serving.runtime.model import Model, error_row, reason_of
from mlx_serving.runtime.slices import Slices
from mlx_serving.runtime.wired import Wiring
from mlx_serving.types import CacheStats
from mlx_serving.worker import wire

log = logging.getLogger(__name__)

HEARTBEAT_S = 2.0
"""How often an idle worker says that it is alive."""
PULSE_S = 1.0
"""How often a busy worker does."""


def _governed(loaded: LoadedModel, options: wire.ModelOptions) -> LoadedModel:
    """With what the settings say of who waits for whom."""
    limits = replace(
        loaded.limits,
        max_wait_s=options.max_wait_s,
        short_jobs_first=options.short_jobs_first,
    )
    return replace(loaded, limits=limits)


class Loop:
    """Obeys the parent until it says Shutdown or closes the socket."""

    def __init__(
        self,
        link: Link,
        load: Loader,
        *,
        collector: Collector,
        now: clock.Clock = clock.monotonic,
        heartbeat_s: float = HEARTBEAT_S,
        pulse_s: float = PULSE_S,
    ) -> None:
        self._link = link
        self._collector = collector
        self._now = now
        self._heartbeat_s = heartbeat_s
        self._pulse = Pulse(link, pulse_s, now)
        self._models: dict[str, Model] = {}
        self._compiles = Compiles(link.ring)
        self._line = Line(now)
        self._load = load
        self._loads = Loads(self._begin_load, now)
        self._device: Device | None = None
        self._wiring = Wiring()
        self._arrivals = count()
        self._short_bytes = 0
        """What a waiting sequence lacks until idle models leave."""

    def run(self) -> None:
        """Returns when it is told to leave or the parent has gone; raises on our own mistakes."""
        try:
            self._link.send(wire.Hello())
            self._pulse.enter("idle")
            while True:
                for message in self._link.receive():
                    if isinstance(message, wire.Shutdown):
                        return
                    self._obey(message)
                self._take_compiled()
                worked = self._step()
                if self._loads:
                    self._advance_load()
                elif not worked:
                    self._sleep()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return
        finally:
            self._pulse.end()
            self._compiles.close()
            self._link.close()
            for model in self._models.values():
                model.close()

    def _take_compiled(self) -> None:
        for seq_id, outcome in self._compiles.take():
            if (model := self._owner(seq_id)) is not None:
                model.compiled(seq_id, outcome)

    def _step(self) -> bool:
        """One step of each model that has work. False: none had."""
        worked = False
        for model in self._models.values():
            if model.has_work and self._pulse.phase != "stepping":
                self._pulse.enter("stepping")
            if model.drag.holds():
                continue
            self._share_memory()
            step = model.step()
            if step is not None:
                model.drag.stepped()
                self._link.send(step)
                self._collector.stepped()
                worked = True
        return worked

    def _share_memory(self) -> None:
        """Give each model its room, by what all hold and want now."""
        if self._device is None:
            return
        models = list(self._models.values())
        weights = sum(model.held_bytes for model in models)
        claims = [model.claim() for model in models]
        sharing = share(self._device.usable_bytes - weights, claims)
        for model, claim, room in zip(models, claims, sharing.rooms, strict=True):
            model.grant(room, alone=len(models) == 1)
            model.lacks_memory = lacks(claim, room)
        if sharing.short_bytes and not self._short_bytes:
            self._link.send(wire.Short(sharing.short_bytes))
        self._short_bytes = sharing.short_bytes

    def _sleep(self) -> None:
        waiting = [model.drag.rest_s for model in self._models.values() if model.sequences]
        rest_s = min(waiting, default=math.inf)
        if rest_s < math.inf:
            self._link.wait(rest_s)
            return
        if self._compiles:
            # Its deadline is a load's: only a compiler that hangs takes so long.
            if self._pulse.phase != "compiling":
                self._pulse.enter("compiling", "a grammar")
            self._link.wait(self._heartbeat_s)
            return
        if self._pulse.phase != "idle":
            self._pulse.enter("idle")
        while not self._link.wait(self._heartbeat_s):
            self._collector.idle()
            self._link.send(wire.Phase("idle", rss_bytes=host.rss_bytes()))
            if self._short_bytes:
                self._link.send(wire.Short(self._short_bytes))

    def _obey(self, message: wire.ToWorker) -> None:
        match message:
            case wire.Submit():
                self._submit(message)
            case wire.Cancel(seq_id):
                self._loads.forget(seq_id)
                if (model := self._owner(seq_id)) is not None:
                    model.cancel(seq_id)
            case wire.Pause(seq_id):
                if (model := self._owner(seq_id)) is not None:
                    model.pause(seq_id)
            case wire.Resume(seq_id):
                if (model := self._owner(seq_id)) is not None:
                    model.resume(seq_id)
            case wire.LoadModel(model_id):
                if (model := self._answering(model_id)) is not None:
                    adapter = model.adapters.get(model_id)
                    info = model.info if adapter is None else adapter.info
                    self._link.send(wire.ModelLoaded(info))
                else:
                    self._loads.ask(message)
            case wire.UnloadModel(model_id):
                self._unload_model(model_id)
            case wire.Tune(model_id=model_id):
                if (model := self._models.get(model_id)) is not None:
                    model.tune(message)
            case wire.Turns(model_id=model_id):
                if (model := self._models.get(model_id)) is not None:
                    model.take_turns(message)
            case wire.Pin(model_id=model_id, pinned=pinned):
                self._pin(model_id, pinned)
            case wire.ClearCache(model_id):
                model = self._models.get(model_id)
                stats = CacheStats() if model is None else model.clear_cache()
                self._link.send(wire.CacheCleared(model_id, stats))
            case wire.Shutdown():
                raise AssertionError("handled by run")
            case _:
                assert_never(message)

    def _answering(self, model_id: str) -> Model | None:
        """The model of that name, or the one that has an adapter of it."""
        if model_id in self._models:
            return self._models[model_id]
        return next((m for m in self._models.values() if model_id in m.adapters), None)

    def _begin_load(self, message: wire.LoadModel) -> Slices[LoadedModel | LoadedAdapter]:
        model_id, path, options = message.model_id, Path(message.path), message.options
        if options.adapter_of is None:
            return self._load(model_id, path, options, self._pulse.enter)
        model = self._models.get(options.adapter_of)
        if model is None:
            raise errors.ModelNotFound(f"model {options.adapter_of!r} is not loaded")
        return model.attach(model_id, path)

    def _pin(self, model_id: str, pinned: bool) -> None:
        if (model := self._models.get(model_id)) is None:
            return
        wiring = self._wiring
        told = wiring.wire(model_id, model.weights) if pinned else wiring.release(model_id)
        self._link.send(told)

    def _submit(self, request: wire.Submit) -> None:
        model = self._answering(request.model_id)
        if model is None and self._loads.hold(request):
            return
        try:
            if model is None:
                raise errors.ModelNotFound(f"model {request.model_id!r} is not loaded")
            model.submit(request)
        except Exception as error:
            row = error_row(request.seq_id, *reason_of(error, "internal_error"))
            self._link.send(wire.Step([row]))

    def _advance_load(self) -> None:
        message = self._loads.first
        model_id = message.model_id
        try:
            self._pulse.enter("loading", model_id)
            loaded = self._loads.advance()
        except Exception as error:
            # A typed error says what is wrong; where it was raised is for whoever mends this program.
            level = logging.DEBUG if isinstance(error, errors.MLXServingError) else logging.ERROR
            log.log(level, "%s: load failed", model_id, exc_info=True)
            self._give_back()
            self._load_ended(model_id, error)
            return
        if isinstance(loaded, LoadedAdapter):
            assert message.options.adapter_of is not None
            self._models[message.options.adapter_of].adapters[model_id] = loaded
        elif loaded is not None:
            depth = message.options.pipeline_depth
            self._models[model_id] = Model(
                _governed(loaded, message.options),
                depth,
                self._now,
                self._announce,
                self._arrivals,
                message.options.slow_step_ms,
                self._line,
                compiles=self._compiles,
                unprepared=message.options.unprepared,
            )
            self._device = loaded.device or self._device
        if loaded is not None:
            self._collector.loaded()
            self._tell_memory()
            self._link.send(wire.ModelLoaded(loaded.info))
            for request in self._loads.held(model_id):
                self._submit(request)

    def _load_ended(self, model_id: str, error: Exception) -> None:
        """Without a model; those who have waited for it are told too."""
        code, message, _ = reason_of(error, "model_unavailable")
        self._link.send(wire.ModelFailed(model_id, code, message))
        rows = [error_row(r.seq_id, code, message) for r in self._loads.held(model_id)]
        if rows:
            self._link.send(wire.Step(rows))

    def _unload_model(self, model_id: str) -> None:
        message = f"model {model_id!r} was unloaded"
        for dropped in self._loads.drop(model_id):
            self._load_ended(dropped, errors.ModelNotFound(message))
        gone = [model_id]
        if (model := self._models.pop(model_id, None)) is not None:
            self._link.send(model.end_all(errors.ModelNotFound.code, message))
            gone = [*model.adapters, model_id]
            self._wiring.release(model_id)
            model.close()
        elif (model := self._answering(model_id)) is not None:
            self._link.send(model.detach(model_id))
        del model
        self._give_back()
        self._tell_memory()
        for name in gone:
            self._link.send(wire.ModelUnloaded(name))

    def _give_back(self) -> None:
        self._collector.unloaded()
        if self._device is not None:
            self._device.give_back()

    def _tell_memory(self) -> None:
        if self._device is not None:
            self._link.send(self._device.use())

    def _owner(self, seq_id: int) -> Model | None:
        """None: it has ended, and the message about it crossed the row that said so."""
        return next((m for m in self._models.values() if seq_id in m.sequences), None)

    def _announce(self, seq_ids: list[int]) -> None:
        self._link.send(wire.Started(seq_ids))
