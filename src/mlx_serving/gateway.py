"""A request's whole story: admit, route, ensure the model, tokenise, reuse or submit, stream.

`Gateway.open()` returns once everything that can be refused has been checked and the sequences
are in the worker's hands; iterating the `Generation` it returns yields text.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from mlx_serving import clock
from mlx_serving.catalog.home import models_home
from mlx_serving.catalog.lifecycle import Failed, ModelSlot, Ready
from mlx_serving.catalog.relief import Relief
from mlx_serving.config import Config
from mlx_serving.generation import Generation, OpenRows, Served
from mlx_serving.live import Apply, LiveSettings, differ, differences
from mlx_serving.pooling import Pooling
from mlx_serving.roster import Roster, brief
from mlx_serving.settle import (
    check_generates,
    check_ids,
    check_room,
    check_thinks,
    constrain,
    settle,
)
from mlx_serving.telemetry.events import EventBus, ModelLoaded, RequestFinished, RequestStarted
from mlx_serving.telemetry.metrics import Metrics
from mlx_serving.telemetry.tally import count, refusals
from mlx_serving.traffic.admission import Admission, class_bounds
from mlx_serving.traffic.ceilings import CEILING_SETTINGS, Ceilings
from mlx_serving.traffic.company import Companies
from mlx_serving.traffic.deadlines import TimeLimits, within
from mlx_serving.traffic.favour import Favour
from mlx_serving.traffic.feature_flags import Switched
from mlx_serving.traffic.response_cache import ResponseCache, bounds, moved, open_cache
from mlx_serving.traffic.reuse import Reuse
from mlx_serving.traffic.rollouts import Rollout, Spec, measured
from mlx_serving.traffic.source import Ask, RowSource
from mlx_serving.traffic.stores.port import Size
from mlx_serving.types import (
    CacheStats,
    ChatPrompt,
    Embeddings,
    EmbedRequest,
    GenerateRequest,
    ModelInfo,
    Priority,
    Prompt,
    Ranking,
    RankRequest,
    SamplingParams,
    ServedModel,
    Turn,
)
from mlx_serving.variants import Variants
from mlx_serving.worker.port import WorkerClient
from mlx_serving.worker.wire import Pin

if TYPE_CHECKING:
    from mlx_serving.traffic.watch import Watch

_THREAD_TOKENS = 4_096
"""From here on token ids are better decoded off the event loop."""


class Gateway:
    def __init__(
        self,
        config: Config,
        slots: Sequence[ModelSlot[Served]],
        worker: WorkerClient,
        metrics: Metrics,
        events: EventBus,
    ) -> None:
        self._config = config
        self._worker = worker
        self._metrics = metrics
        self._events = events
        events.add_hook(partial(count, metrics), RequestFinished)
        self._slots = Roster(slots, _patterns(config, slots), worker)
        self._admission = Admission(class_bounds(config.max_queue, config.class_queue))
        for priority in Priority:
            is_open = partial(self._admission.open_of, priority)
            metrics.open_requests.labels(priority.name.lower()).set_function(is_open)
        self._pooling = Pooling(self._slots, self._admission, worker, metrics, events)
        self.ceilings = Ceilings(config, worker, metrics)
        events.add_hook(lambda event: self.ceilings.loaded(event.info), ModelLoaded)
        self.companies = Companies()
        self.relief = Relief(self._slots.bases)
        self._favour = Favour()
        self._reuse = _reuse(config, metrics)
        metrics.cache_entries.set_function(lambda: self._cache_size().entries)
        metrics.cache_bytes.set_function(lambda: self._cache_size().bytes)
        self._variants = Variants(config, self._slots, self.open, metrics)
        self.rollouts = self._variants.rollouts
        self.watch = self._make_watch(config)
        self._limits = TimeLimits.of(config)
        self.live = LiveSettings(config)
        self.live.own(self._prepare)
        self._running: set[Generation] = set()

    def _make_watch(self, config: Config) -> Watch | None:
        """Raises ConfigError."""
        if not (config.slo or config.watch_drift):
            return None
        from mlx_serving.traffic.watch import Watch  # few servers need it

        return Watch(
            config,
            self._admission,
            self.ceilings,
            self.rollouts,
            self._favour,
            self.relief,
            self._events,
            self._metrics,
        )

    def _prepare(self, wanted: Config) -> Apply:
        """See `live.Prepare`: for requests that come from now on; those that run are left alone."""
        old = self._config
        watched = differ(old, wanted, "slo", "alert_", "watch_drift", "baselines_file")
        watch = self._make_watch(wanted) if watched else None
        flags = self._variants.parse_flags(wanted.feature_flags)
        cache = _cache(wanted, self._metrics) if moved(old, wanted) else self._reuse.cache
        aliases = self._slots.resolved(_patterns(wanted, self._slots.bases))

        async def apply() -> None:
            self._config, self._limits = wanted, TimeLimits.of(wanted)
            self._variants.flags = flags
            self._slots.aliases = aliases
            self._admission.bounds = class_bounds(wanted.max_queue, wanted.class_queue)
            for slot, entry in zip(self._slots.bases, wanted.entries, strict=True):
                for kept in (slot, *slot.adapters):
                    kept.keep_alive_s = wanted.of(entry).keep_alive_s
            if old.log_level != wanted.log_level:
                logging.getLogger("mlx_serving").setLevel(wanted.log_level.upper())
            if differ(old, wanted, "slo", *CEILING_SETTINGS):
                self.ceilings.configure(wanted)
            await self._reuse.change(wanted.coalesce, wanted.coalesce_subscribers, cache)
            if cache is not None:
                cache.bound(bounds(wanted))
            if watched:
                await self._rewatch(watch)
            elif self.watch is not None and (changed := differences(old, wanted)):
                self.watch.mark(f"{', '.join(changed)} changed")

        return apply

    async def _rewatch(self, watch: Watch | None) -> None:
        """Watch other levels; what was done for the ones before is undone."""
        before, self.watch = self.watch, watch
        if before is not None:
            await before.stop()
        self._admission.narrow(None, 0)
        self._favour.objectives = ()
        self.ceilings.tune(0, 0)
        self.relief.keep_out(0)
        self._metrics.slo_burn.clear()
        self._metrics.slo_figure.clear()
        self._metrics.slo_violated.clear()
        if watch is not None:
            watch.start()

    def _cache_size(self) -> Size:
        return (self._reuse.cache and self._reuse.cache.size()) or Size()

    def start(self) -> None:
        """Needs a running event loop."""
        if self.watch is not None:
            self.watch.start()

    async def open(self, request: GenerateRequest) -> Generation:
        """Accept a request and start its sequences. Raises a typed error before any work is done."""
        asked = self._slots.find(request.model)
        with refusals(self._metrics, asked.model_id, request.priority):
            switched = self._variants.switched(asked, request)
            request = switched.applied(request)
            async with within(request.timeout_s):
                return await self._open(asked, request, switched)

    async def _open(
        self, asked: ModelSlot[Served], request: GenerateRequest, switched: Switched
    ) -> Generation:
        arrived_s = clock.monotonic()
        self._admission.enter(arrived_s, request.priority)
        try:
            answerer = await self._variants.answerer(asked, request, switched.use)
        except BaseException:
            self._admission.leave(clock.monotonic(), request.priority)
            raise
        slot, served = answerer.slot, answerer.served
        try:
            check_generates(served.info)
            check_thinks(request.prompt, served.info, served.text)
            check_room(request.prompt, served.text.least_tokens(request.prompt), served.info)
            token_ids = await self._tokenise(served, request.prompt)
            sampling = settle(request, served.info, len(token_ids), self._config.max_tokens)
            constrained = constrain(request, served.text, token_ids)
            ended = partial(self._ended, slot)
            generation = Generation(
                constrained,
                slot.model_id,
                served,
                token_ids,
                sampling,
                arrived_s,
                ended,
                self._limits.asked(request.timeout_s),
            )
            # An adapter's rows are in its model's steps.
            steps_of = (slot.base or slot).model_id
            generation.arm, generation.meeting = answerer.arm, self.companies.meet(steps_of)
            generation.asked, generation.flags = asked.model_id, switched.flags
            await generation.start(self._rows_for(served, constrained, token_ids, arrived_s))
        except BaseException:
            slot.release()
            self._admission.leave(clock.monotonic(), request.priority)
            raise
        self._running.add(generation)
        self._variants.shadow(slot, request, generation)
        self._events.publish(
            RequestStarted(
                request_id=request.request_id,
                model_id=slot.model_id,
                prompt_tokens=len(token_ids),
            )
        )
        return generation

    async def embed(self, request: EmbedRequest) -> Embeddings:
        """The vectors of texts; see `pooling`."""
        return await self._pooling.embed(request)

    async def rank(self, request: RankRequest) -> Ranking:
        """Documents in the order in which they answer a query."""
        return await self._pooling.rank(request)

    async def tokenise(self, model: str, prompt: Prompt) -> list[int]:
        """A prompt's token ids, as `open` would have them."""
        async with self._slots.find(model).use() as served:
            return await self._tokenise(served, prompt)

    async def detokenise(self, model: str, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included. Raises InvalidRequest for an id too high."""
        async with self._slots.find(model).use() as served:
            check_ids("tokens", token_ids, served.info.vocab_size)
            if len(token_ids) < _THREAD_TOKENS:
                return served.text.decode(token_ids, skip_special_tokens=False)
            return await asyncio.to_thread(served.text.decode, token_ids, skip_special_tokens=False)

    async def load(
        self, model: str, keep_alive_s: float | None = None, *, anew: bool = False
    ) -> ServedModel:
        """Wait until a model can answer; raises why it cannot. `keep_alive_s` as in a request; `anew`:
        try even where it has just failed."""
        slot = self._slots.find(model)
        if anew:
            slot.forgive()
        await slot.acquire()
        slot.release(keep_alive_s)
        return self._slots.describe(slot)

    async def unload(self, model: str) -> ServedModel:
        """Take a model out of memory once its running requests have ended."""
        slot = self._slots.find(model)
        await asyncio.shield(slot.unload())
        return self._slots.describe(slot)

    def pin(self, model: str, pinned: bool) -> ServedModel:
        """Whether a model may leave memory by itself; it comes into it when it is asked for."""
        slot = self._slots.find(model)
        slot.pin(pinned)
        self._worker.order(Pin(model_id=slot.model_id, pinned=pinned))
        return self._slots.describe(slot)

    def model_id(self, model: str) -> str:
        """The id of the served model that a name leads to. Raises ModelNotFound."""
        return self._slots.find(model).model_id

    def model_info(self, model: str) -> ModelInfo | None:
        """What is known of a loaded model; None while it is not. Raises ModelNotFound."""
        state = self._slots.find(model).state
        return state.loaded.info if isinstance(state, Ready) else None

    def abilities(self, model: str) -> tuple[str, ...]:
        """Of `tools` and `thinking`, those that a loaded model's chat template knows."""
        state = self._slots.find(model).state
        return state.loaded.text.abilities() if isinstance(state, Ready) else ()

    def raise_failure(self) -> None:
        """Raises the error of the first model that could not be loaded, if there is one."""
        for slot in self._slots:
            if isinstance(slot.state, Failed):
                raise slot.state.error

    def default_model(self) -> str:
        return self._slots.default.model_id

    def models(self) -> list[ServedModel]:
        """Every configured model, the default first, whatever its state."""
        return [self._slots.describe(slot) for slot in self._slots]

    def health(self) -> dict[str, object]:
        workers, models = self._worker.health(), self.models()
        return {
            "status": self._status(
                all(w.state in ("ready", "loading") and w.cause is None for w in workers)
            ),
            "reasons": [
                *(w.cause for w in workers if w.cause),
                *(m.reason for m in models if m.status == "failed" and m.reason),
            ],
            "pid": os.getpid(),
            "workers": [msgspec.to_builtins(w) for w in workers],
            "models": [brief(m) for m in models],
            "open_requests": self._admission.open_requests,
            **({"ceilings": ceilings} if (ceilings := self.ceilings.report()) else {}),
            **(self.watch.health() if self.watch is not None else {}),
        }

    def start_rollout(self, spec: Spec) -> Rollout:
        """Raises InvalidRequest or ModelNotFound, naming the field of `spec`."""
        return self._variants.start(spec)

    def cache_stats(self) -> dict[str, CacheStats]:
        """Each model's prefix cache, its adapters' included, as its worker told last."""
        latest = self._metrics.prefix_cache.latest
        ids = [slot.model_id for slot in self._slots.bases]
        return {model_id: latest.get(model_id, CacheStats()) for model_id in ids}

    async def clear_cache(self) -> None:
        """Forget every prefix that no running sequence uses, in memory and on disk."""
        for slot in self._slots.bases:
            stats = await self._worker.clear_cache(slot.model_id)
            self._metrics.prefix_cache.take(slot.model_id, stats)

    def metrics(self) -> bytes:
        return self._metrics.render()

    def cancel(self, request_id: str) -> bool:
        """Cancel a running request; False if there is none by that id."""
        found = [g for g in self._running if g.request_id == request_id]
        for generation in found:
            generation.cancel()
        return bool(found)

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for the running ones. True when all of them finished."""
        self._admission.drain(clock.monotonic() + timeout_s)
        self._variants.stop_copying()
        self.rollouts.save()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._admission.emptied()
        return self._admission.open_requests == 0

    async def close(self) -> None:
        """Let go of what outlives requests."""
        if self.watch is not None:
            await self.watch.stop()
        await self._reuse.close()

    def _status(self, workers_live: bool) -> str:
        if self._admission.draining:
            return "draining"
        states = [slot.state for slot in self._slots]
        if self._worker.broken or any(isinstance(state, Failed) for state in states):
            return "degraded"
        if not all(slot.settled for slot in self._slots):
            return "starting"
        return "ready" if workers_live else "degraded"

    async def _tokenise(self, served: Served, prompt: Prompt) -> list[int]:
        stage = self._metrics.ttft_stage.labels(served.info.model_id, "tokenise")
        with stage.time():
            # A long prompt must not hold up the streams that this event loop serves.
            if served.text.prefers_thread(prompt):
                return await asyncio.to_thread(served.text.encode_prompt, prompt)
            return served.text.encode_prompt(prompt)

    def _rows_for(
        self, served: Served, request: GenerateRequest, token_ids: list[int], arrived_s: float
    ) -> OpenRows:
        turn = _turn(request, arrived_s)

        async def open_rows(sampling: SamplingParams) -> RowSource:
            ask = _ask(served, request, token_ids, sampling, turn)
            return await self._reuse.open(ask, lambda: self._submit(ask))

        return open_rows

    def _submit(self, ask: Ask) -> RowSource:
        return self._worker.submit(
            ask.model_id,
            ask.token_ids,
            ask.sampling,
            priority=self._favour.priority(ask),
            grammar=ask.grammar,
            cache_salt=ask.cache_salt,
            turn=ask.turn,
        )

    def _ended(self, slot: ModelSlot[Served], generation: Generation, outcome: str) -> None:
        slot.release(generation.request.keep_alive_s)
        now_s = clock.monotonic()
        self._admission.leave(now_s, generation.request.priority)
        self._running.discard(generation)
        finished = generation.finished(outcome, now_s - generation.arrived_s)
        if finished.complete:
            self._reuse.keep(generation.sources)
        if generation.arm is not None and (figures := measured(finished)) is not None:
            self.rollouts.observe(generation.arm, figures)
        self._events.publish(finished)


def _patterns(config: Config, slots: Sequence[ModelSlot[Served]]) -> list[str]:
    """More names that lead to models, as `Roster` takes them."""
    own = zip((slot for slot in slots if slot.base is None), config.entries, strict=True)
    of_entries = [f"{alias}={slot.model_id}" for slot, entry in own for alias in entry.aliases]
    return [*config.model_aliases, *of_entries]


def _reuse(config: Config, metrics: Metrics) -> Reuse:
    return Reuse(
        config.coalesce,
        config.coalesce_subscribers,
        on_join=lambda ask: metrics.coalesced.labels(ask.model_id).inc(),
        cache=_cache(config, metrics),
    )


def _cache(config: Config, metrics: Metrics) -> ResponseCache | None:
    """Raises ConfigError."""
    return open_cache(config, models_home(config.home, os.environ) / "responses", metrics)


def _turn(request: GenerateRequest, arrived_s: float) -> Turn:
    return Turn(
        arrived_s=arrived_s,
        client=request.client,
        weight=request.weight,
        expected_tokens=request.max_tokens,
        deadline_s=None if request.timeout_s is None else arrived_s + request.timeout_s,
    )


def _ask(
    served: Served,
    request: GenerateRequest,
    token_ids: list[int],
    sampling: SamplingParams,
    turn: Turn,
) -> Ask:
    ask = Ask(
        model_id=served.info.model_id,
        fingerprint=served.fingerprint,
        token_ids=token_ids,
        sampling=sampling,
        grammar=request.grammar,
        stop=request.stop,
        one_call=isinstance(request.prompt, ChatPrompt) and not request.prompt.parallel_tool_calls,
        cache_salt=request.cache_salt,
        seeded=request.seed is not None,
        priority=request.priority,
        turn=turn,
        caching=request.caching,
    )
    if request.n > 1 and not ask.deterministic:
        # One seed, which the answer names, keys them all.
        return msgspec.structs.replace(ask, caching="none")
    return ask
