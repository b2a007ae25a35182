"""Brings the configured models up and takes them down: files, memory, worker and text side.

The engine's hands for `catalog.lifecycle`: each model is a slot there, and comes into memory when
it is asked for, or at the start as far as the budget holds.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from mlx_serving import host
from mlx_serving.catalog import budget
from mlx_serving.catalog.adapters import ensure_adapter
from mlx_serving.catalog.ensure import Progress, ensure
from mlx_serving.catalog.facts import count_in
from mlx_serving.catalog.fingerprint import fingerprint
from mlx_serving.catalog.folder import ModelFolder, read_config
from mlx_serving.catalog.lifecycle import (
    Draining,
    FetchBegan,
    LoadBegan,
    ModelSlot,
    NoRoom,
    Ready,
)
from mlx_serving.catalog.names import default_name
from mlx_serving.catalog.residency import Residency
from mlx_serving.config import Config
from mlx_serving.content.text import Reading, read_template
from mlx_serving.content.text_sides import TextSides
from mlx_serving.errors import ConfigError, MLXServingError
from mlx_serving.generation import Served
from mlx_serving.live import Apply
from mlx_serving.model_entry import ModelEntry, parse_adapter
from mlx_serving.telemetry.events import (
    EventBus,
    ModelFailed,
    ModelLoaded,
    ModelLoading,
    ModelUnloaded,
)
from mlx_serving.types import ModelInfo, Priority
from mlx_serving.warm_up import warm_up
from mlx_serving.worker.port import WorkerClient
from mlx_serving.worker.wire import ModelOptions, Pin, Turns

log = logging.getLogger(__name__)

Slot = ModelSlot[Served]


class Models:
    """`lifecycle.Hands` over a worker. Raises ConfigError for names that contradict each other, and for
    chat templates that cannot be read."""

    def __init__(
        self,
        config: Config,
        worker: WorkerClient,
        events: EventBus,
        progress: Progress | None = None,
        machine: host.Host | None = None,
    ) -> None:
        self._config = config
        self._worker = worker
        self._events = events
        self._progress = progress
        self._machine = machine or host.look()
        self._text_sides = TextSides()
        self._warming: dict[str, asyncio.Task[None]] = {}
        """Warm-ups in a worker that took another's place. One that failed is not repeated."""
        self._own: dict[str, tuple[ModelEntry, Config]] = {}
        """Each model's entry and settings, by its id."""
        self.slots: Sequence[Slot] = self._make_slots()
        self.residency = Residency(
            host.memory_budget_bytes(config.memory_budget, self._machine),
            wait_s=config.memory_wait_s,
        )
        self.residency.watch(self.slots)

    async def start(self) -> None:
        """Bring up, in their order, those that fit; the others come when they are asked for."""
        for slot in self.slots:
            await asyncio.wait([slot.start(asked=slot is self.slots[0])])

    async def close(self) -> None:
        for slot in self.slots:
            await slot.close()
        for task in self._warming.values():
            task.cancel()
        await asyncio.gather(*self._warming.values(), return_exceptions=True)

    def reloaded(self, model_id: str) -> None:
        """A worker has a model. Where it had been loaded before, and the worker has died since, it is
        warmed up again, behind the streams that go on."""
        slot = next(slot for slot in self.slots if slot.model_id == model_id)
        task = self._warming.get(model_id)
        if slot.base is not None or not isinstance(slot.state, Ready):
            return
        prompts = self._own[model_id][0].warm_up
        if not prompts:
            return
        if task is None or (task.done() and not task.cancelled() and task.exception() is None):
            again = warm_up(self._worker, slot.state.loaded, prompts, Priority.LOW)
            self._warming[model_id] = asyncio.create_task(again, name=f"warm up {model_id} again")
            self._warming[model_id].add_done_callback(_say_why)

    def prepare(self, wanted: Config) -> Apply:
        """See `live.Prepare`. Who was pinned by a request stays so, unless the setting changes that."""
        own = {m: (entry, wanted.of(entry)) for m, (entry, _) in self._own.items()}
        before = self._pinned(self._config.pin, self.slots)
        after = self._pinned(wanted.pin, self.slots)

        async def apply() -> None:
            self._config, old, self._own = wanted, self._own, own
            for model_id, (_, config) in own.items():
                turns = _turns(model_id, config)
                if turns != _turns(model_id, old[model_id][1]):
                    self._worker.order(turns)
            self.residency.wait_s = wanted.memory_wait_s
            for slot in self.slots:
                if (slot in after) != (slot in before):
                    self.pin(slot, slot in after)

        return apply

    def pin(self, slot: Slot, pinned: bool) -> None:
        slot.pin(pinned)
        self._worker.order(Pin(model_id=slot.model_id, pinned=pinned))

    # lifecycle.Hands

    async def bring_up(self, slot: Slot, *, asked: bool) -> Served:
        """Fetch a model's files, find room, then load worker and text side at the same time. An adapter
        keeps its model there meanwhile, and comes only beside one that is there."""
        base = slot.base
        if base is not None and not base.hold():
            raise NoRoom
        self._events.publish(ModelLoading(model_id=slot.model_id))
        slot.enter(FetchBegan())
        try:
            if base is None:
                served = await self._bring_model(slot, asked)
            else:
                served = await self._bring_adapter(slot, base, asked)
        except NoRoom:
            raise
        except BaseException as error:
            self.residency.gone(slot.model_id)
            code = getattr(error, "code", "model_unavailable")
            self._events.publish(
                ModelFailed(model_id=slot.model_id, code=str(code), message=str(error))
            )
            raise
        finally:
            if base is not None:
                base.release()
        self._events.publish(ModelLoaded(model_id=slot.model_id, info=served.info))
        return served

    async def take_down(self, slot: Slot) -> None:
        for adapter in slot.adapters:
            await asyncio.shield(adapter.unload())
        try:
            await self._worker.unload_model(slot.model_id)
        finally:
            self.residency.gone(slot.model_id)
            self._events.publish(ModelUnloaded(model_id=slot.model_id))

    async def _bring_model(self, slot: Slot, asked: bool) -> Served:
        folder = await asyncio.to_thread(ensure, slot.source, self._config, self._progress)
        slot.enter(LoadBegan())
        _, own = self._own[slot.model_id]
        need = budget.estimate_folder(folder, own.dtype, self._machine.system)
        await self.residency.make_room(slot, need, asked=asked)
        slot.enter(LoadBegan())
        return await self._load(slot, folder)

    async def _bring_adapter(self, slot: Slot, base: Slot, asked: bool) -> Served:
        files = await asyncio.to_thread(ensure_adapter, slot.source, self._config, self._progress)
        slot.enter(LoadBegan())
        await self.residency.make_room(slot, files.held_bytes, asked=asked)
        slot.enter(LoadBegan())
        options = ModelOptions(adapter_of=base.model_id)
        info = await self._worker.load_model(slot.model_id, str(files.path), options)
        self.residency.loaded(slot.model_id, info.held_bytes)
        assert isinstance(base.state, Ready | Draining), "it is held"
        beside = base.state.loaded
        own = await asyncio.to_thread(files.fingerprint)
        return Served(info, beside.text, f"{beside.fingerprint} {own}")

    async def _load(self, slot: Slot, folder: ModelFolder) -> Served:
        entry, own = self._own[slot.model_id]
        reading = Reading.of(own, threads="tokenise" not in entry.unprepared)
        options = _options(entry, own, folder.tokenizer_path)
        self._worker.order(Pin(model_id=slot.model_id, pinned=slot.pinned))
        loading = asyncio.create_task(
            self._worker.load_model(slot.model_id, str(folder.path), options)
        )
        try:
            text, files, parameters = await asyncio.gather(
                asyncio.to_thread(self._text_sides.load, folder.tokenizer_path, reading),
                asyncio.to_thread(fingerprint, folder.path, folder.tokenizer_path),
                asyncio.to_thread(_parameters, folder.path),
            )
            info = msgspec.structs.replace(await loading, parameters=parameters)
            served = Served(info, text, f"{files} {info.dtype} {info.kernels} {info.kv_bits}")
            if entry.warm_up:
                slot.enter(LoadBegan("it is warmed up"))
                await warm_up(self._worker, served, entry.warm_up)
        except asyncio.CancelledError:
            loading.cancel()
            raise
        except Exception:
            # A model without its other half is of no use in the worker.
            with suppress(MLXServingError):
                await loading
                await self._worker.unload_model(slot.model_id)
            raise
        self.residency.loaded(slot.model_id, _measured(info))
        return served

    def _make_slots(self) -> list[Slot]:
        c = self._config
        if c.served_model_name and len(c.served_model_name) != len(c.models):
            raise ConfigError(
                f"{len(c.served_model_name)} served names for {len(c.models)} models; "
                "give one each or none.",
                param="served_model_name",
            )
        slots: list[Slot] = []
        ids = [_model_id(c, i, entry) for i, entry in enumerate(c.entries)]
        for model_id, entry in zip(ids, c.entries, strict=True):
            # A name that several models could have is the first one's, and a model's own before that.
            taken = {*ids, *(alias for slot in slots for alias in slot.aliases)}
            own_names = dict.fromkeys((default_name(entry.model), entry.model))
            aliases = tuple(name for name in own_names if name not in taken)
            own = c.of(entry)
            if own.chat_template is not None:
                read_template(own.chat_template)  # a wrong path is told before anything is loaded
            self._own[model_id] = entry, own
            slots.append(
                ModelSlot(
                    entry.model, model_id, aliases, self, own.keep_alive_s, pinned=entry.pinned
                )
            )
        slots += self._make_adapters(slots)
        if len(set(ids)) != len(ids):
            raise ConfigError(
                "Two models have the same name; set served_model_name, or the entries' name.",
                param="models",
            )
        for slot in self._pinned(c.pin, slots):
            slot.pinned = True
        return slots

    def _pinned(self, names: Sequence[str], slots: Sequence[Slot]) -> list[Slot]:
        """Those that `pin` names, and those whose entry says so. Raises ConfigError."""
        for name in names:
            if not any(slot.answers_to(name) for slot in slots):
                raise ConfigError(f"pin: '{name}' names no served model", param="pin")
        return [
            slot
            for slot in slots
            if any(map(slot.answers_to, names))
            or (slot.base is None and self._own[slot.model_id][0].pinned)
        ]

    def _make_adapters(self, models: Sequence[Slot]) -> list[Slot]:
        """A slot for each adapter, behind its model's."""
        c = self._config
        given = [(models[i], text) for i, e in enumerate(c.entries) for text in e.adapters]
        for text in c.adapter:
            base = parsed.base if (parsed := parse_adapter(text)) else None
            model = next((m for m in models if base is None or m.answers_to(base)), None)
            if model is None:
                raise ConfigError(f"adapter: '{text}' names no served model", param="adapter")
            given.append((model, text))
        taken = {name for model in models for name in (model.model_id, *model.aliases)}
        made: list[Slot] = []
        for model, text in given:
            adapter = parse_adapter(text)
            assert adapter is not None, "the settings were checked"
            model_id = f"{model.model_id}+{adapter.name}"
            if model_id in taken:
                raise ConfigError(f"adapter: '{model_id}' is there twice", param="adapter")
            aliases = tuple({adapter.name} - taken)
            taken |= {model_id, adapter.name}
            slot = ModelSlot(
                adapter.source, model_id, aliases, self, model.keep_alive_s, base=model
            )
            model.adapters.append(slot)
            made.append(slot)
        return made


def _say_why(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.warning("%s", error)


def _model_id(config: Config, index: int, entry: ModelEntry) -> str:
    if config.served_model_name:
        return config.served_model_name[index]
    return entry.name or default_name(entry.model)


def _options(entry: ModelEntry, config: Config, tokenizer_path: Path) -> ModelOptions:
    c = config
    return ModelOptions(
        max_num_seqs=c.max_num_seqs,
        prefill_step_size=c.prefill_step_size,
        max_itl_ms=c.max_itl_ms,
        pipeline_depth=c.pipeline_depth,
        context_length=c.context_length,
        dtype=c.dtype,
        kernels=c.kernels,
        kv_bits=c.kv_bits,
        exact_batch=c.exact_batch,
        prefix_cache_bytes=c.prefix_cache_bytes,
        max_wait_s=_max_wait_s(c),
        short_jobs_first=c.short_jobs_first,
        jump_forward=c.jump_forward,
        json_digit_tokens=c.json_digit_tokens,
        json_string_tokens=c.json_string_tokens,
        json_white_space=c.json_white_space,
        kv_disk_path=c.kv_disk_path and str(Path(c.kv_disk_path).expanduser().absolute()),
        kv_disk_bytes=c.kv_disk_bytes,
        slow_step_ms=entry.slow_step_ms,
        unprepared=entry.unprepared,
        memory_budget=c.memory_budget,
        tokenizer_path=str(tokenizer_path),
    )


def _turns(model_id: str, config: Config) -> Turns:
    return Turns(
        model_id=model_id,
        max_wait_s=_max_wait_s(config),
        short_jobs_first=config.short_jobs_first,
    )


def _max_wait_s(config: Config) -> float:
    return config.max_wait_s or math.inf


def _parameters(path: Path) -> int:
    return count_in(path, read_config(path)) or 0


def _measured(info: ModelInfo) -> int:
    return budget.measured_bytes(info.held_bytes, info.kv_bytes_per_token, info.context_length)
