"""The public engine: opens and closes everything (`sync.SyncEngine` is its synchronous twin).

    async with Engine("smollm2-135m") as engine:
        async for chunk in engine.generate("Once upon a time", max_tokens=32):
            print(chunk.text, end="")

The server is this engine with an HTTP API over `engine.gateway`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from mlx_serving.answers import (
    PARAMS,
    Chunk,
    Completion,
    PromptLike,
    TextsLike,
    chunk_of,
    collect,
    to_embed_request,
    to_prompt,
    to_rank_request,
    to_request,
)
from mlx_serving.catalog.ensure import Progress
from mlx_serving.catalog.prefetch import Prefetch
from mlx_serving.config import FIELDS, Config
from mlx_serving.config_sources import override
from mlx_serving.gateway import Gateway
from mlx_serving.generation import Generation
from mlx_serving.live import Apply
from mlx_serving.models import Models
from mlx_serving.spellings import OPTIONS, normalise, normalise_settings, spelled_back
from mlx_serving.telemetry.events import EventBus, Subscription, WorkerDied, WorkerStarted
from mlx_serving.telemetry.metrics import Metrics
from mlx_serving.types import Embeddings, Ranking
from mlx_serving.worker import port
from mlx_serving.worker.growth import Growth
from mlx_serving.worker.watchdog import Deadlines
from mlx_serving.worker.wire import StepStats

log = logging.getLogger(__name__)


class Engine:
    """Serves one or more models in a supervised worker process.

    Args:
        model: alias, hub id, local folder or .gguf file, or several; a mapping has the keys of a
            `ModelEntry` and settings of its own. Overrides `config.models`.
        config: every setting; `settings` override single fields of it (see `Config`), by their own
            names or as other engines spell them (see `spellings`).
        progress: receives the progress of downloads and conversions.

    Raises:
        ConfigError: a setting is unknown or out of its range.
    """

    def __init__(
        self,
        model: str | Sequence[str | Mapping[str, Any]] | None = None,
        *,
        config: Config | None = None,
        progress: Progress | None = None,
        **settings: Any,
    ) -> None:
        if model is not None:
            settings["model"] = model
        given = normalise_settings(settings, FIELDS)
        self.config = override(config or Config(), given.values, given.spelled)
        self.metrics = Metrics()
        self.events = EventBus(on_drop=self.metrics.events_dropped.inc)
        self._worker = self._make_worker()
        self._models = Models(self.config, self._worker, self.events, progress)
        self._prefetch = self._make_prefetch()
        self._starting: asyncio.Task[None] | None = None
        self.gateway = Gateway(
            self.config, self._models.slots, self._worker, self.metrics, self.events
        )
        self.gateway.live.own(self._models.prepare)
        self.gateway.live.own(self._prepare)

    # Life

    async def start(self, *, wait_ready: bool = True) -> None:
        """Start the worker and bring up the models that fit the budget; with `wait_ready=False`, in
        the background.

        Raises the first model's error when waiting.
        """
        self.gateway.start()
        self._worker.start()
        self._starting = asyncio.create_task(self._models.start(), name="start models")
        if wait_ready:
            await self._starting
            self.gateway.raise_failure()

    async def stop(self, drain_timeout_s: float = 0.0) -> None:
        """Let running requests finish for `drain_timeout_s`, then end the worker."""
        if drain_timeout_s > 0:
            await self.gateway.drain(drain_timeout_s)
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        await self._models.close()
        await self._prefetch.close()
        await self._worker.stop()
        await self.gateway.close()

    def restart(self) -> None:
        """Replace the worker; running streams go on in the next one. Tries again what failed."""
        for slot in self._models.slots:
            slot.forgive()
        self._worker.restart()

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()

    # Requests

    async def generate(
        self, prompt: PromptLike, *, model: str | None = None, **params: Any
    ) -> AsyncIterator[Chunk]:
        """Stream the continuation of a text, of token ids, or of chat messages.

        `params` are the fields of `SamplingParams` and of `GenerateRequest` (`max_tokens`, `seed`,
        `n`, `stop`, …), by their own names or as other engines spell them (see `spellings`): `session`
        keeps a user with one variant, `caching` is of kept answers. `response_format` is OpenAI's; `grammar` a `Grammar`, or the text of a Lark grammar. Raises the
        same typed errors that the HTTP API reports.
        """
        generation = await self._open(prompt, model, params)
        try:
            async for events in generation:
                for event in events:
                    yield chunk_of(event)
        finally:
            generation.cancel()

    async def complete(
        self, prompt: PromptLike, *, model: str | None = None, **params: Any
    ) -> Completion:
        """The whole continuation at once."""
        return await collect(await self._open(prompt, model, params))

    async def chat(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        *,
        model: str | None = None,
        **params: Any,
    ) -> Completion:
        """Answer a conversation; a plain string is one user message."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return await self.complete(messages, model=model, **params)

    async def batch(
        self, prompts: Sequence[PromptLike], *, model: str | None = None, **params: Any
    ) -> list[Completion]:
        """Complete several prompts together, in their order; the first error is raised."""
        return list(
            await asyncio.gather(*(self.complete(p, model=model, **params) for p in prompts))
        )

    async def embed(
        self,
        texts: TextsLike,
        *,
        model: str | None = None,
        dimensions: int | None = None,
        normalize: bool = True,
        truncate: int | bool = False,
        prompt_name: str | None = None,
    ) -> Embeddings:
        """The vectors of one text or several, each a text or token ids.

        Args:
            dimensions: keep only the first so many numbers of each vector.
            normalize: scale vectors to length 1.
            truncate: tokens to keep of a longer text; True: as many as the model takes.
            prompt_name: which of the model's own prompts precedes each text.
        """
        name = model or self.gateway.default_model()
        options = {"dimensions": dimensions, "normalize": normalize, "prompt_name": prompt_name}
        return await self.gateway.embed(to_embed_request(texts, name, truncate, options))

    async def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        model: str | None = None,
        top_n: int | None = None,
        truncate: int | bool = False,
        instruction: str | None = None,
    ) -> Ranking:
        """The documents in the order in which they answer the query, the best first.

        `truncate`: tokens to keep of the query and a document together; True: as many as the model
        takes. `instruction`: the task, for a reranker that is a language model and takes one. Raises
        InvalidRequest for a model that neither ranks nor embeds.
        """
        name = model or self.gateway.default_model()
        options = {"query": query, "documents": documents, "top_n": top_n}
        if instruction is not None:
            options["instruction"] = instruction
        return await self.gateway.rank(to_rank_request(name, truncate, options))

    async def tokenize(self, prompt: PromptLike, *, model: str | None = None) -> list[int]:
        """The token ids that the model would see."""
        name = model or self.gateway.default_model()
        return await self.gateway.tokenise(name, to_prompt(prompt, {}))

    async def detokenize(self, token_ids: Sequence[int], *, model: str | None = None) -> str:
        """Their text, control tokens included."""
        return await self.gateway.detokenise(model or self.gateway.default_model(), token_ids)

    # Events

    def on(self, kind: type[Any], hook: Callable[[Any], None]) -> Callable[[], None]:
        """Call `hook` with each event of a type of `telemetry.events`; returns what removes it."""
        return self.events.add_hook(hook, kind)

    def subscribe(self) -> Subscription:
        """An async iterator of every event from now on."""
        return self.events.subscribe()

    # Parts

    async def _open(
        self, prompt: PromptLike, model: str | None, params: dict[str, Any]
    ) -> Generation:
        given = normalise(params, PARAMS, OPTIONS)
        with spelled_back(given.spelled):
            request = to_request(prompt, model or self.gateway.default_model(), given.values)
            return await self.gateway.open(request)

    def _prepare(self, wanted: Config) -> Apply:
        """See `live.Prepare`."""

        async def apply() -> None:
            self.config = wanted
            self._prefetch.threshold = wanted.prefetch
            self._worker.bound(
                _deadlines(wanted), wanted.resume_timeout_s, wanted.worker_rss_limit_bytes
            )

        return apply

    def _make_prefetch(self) -> Prefetch:
        prefetch = Prefetch(
            {slot.model_id: slot for slot in self._models.slots},
            self._models.residency,
            self.config.prefetch,
            lambda outcome: self.metrics.prefetches.labels(outcome).inc(),
        )
        self.events.add_hook(prefetch.hear)
        return prefetch

    def _make_worker(self) -> port.WorkerClient:
        # Imported here: only one of the two is ever needed, and inprocess brings the runtime.
        worker: port.WorkerClient
        if self.config.supervise:
            from mlx_serving.worker.supervisor import Supervisor

            c = self.config
            worker = Supervisor(
                deadlines=_deadlines(c),
                max_deaths=c.max_request_deaths,
                resume_timeout_s=c.resume_timeout_s,
                growth=Growth(c.worker_rss_limit_bytes),
            )
        else:
            from mlx_serving.worker.inprocess import InProcessWorker

            worker = InProcessWorker(load_timeout_s=self.config.load_timeout_s)
        worker.on_event = self._on_worker_event
        worker.on_stats = self._on_stats
        return worker

    def _on_worker_event(self, event: port.WorkerEvent) -> None:
        m = self.metrics
        match event:
            case port.WorkerStarted(pid, restarts):
                m.worker_up.set(1)
                if restarts:
                    m.worker_restarts.inc()
                self.events.publish(WorkerStarted(pid=pid, restarts=restarts))
            case port.WorkerExited(pid, cause):
                m.worker_up.set(0)
                self.events.publish(WorkerDied(pid=pid, cause=cause))
            case port.ModelReady(info):
                self._models.reloaded(info.model_id)
            case port.MemoryUse(memory):
                self._models.residency.budget_bytes = memory.budget_bytes
                for kind, count in memory.kinds().items():
                    m.memory.labels(kind).set(count)
            case port.MemoryShort(count):
                self._models.residency.relieve(count)
            case port.ModelGone(model_id):
                for gauge in (m.running, m.waiting, m.kv_tokens, m.kv_capacity):
                    gauge.labels(model_id).set(0)
            case _:
                pass  # loads are told by Models, which knows the files' side too

    def _on_stats(self, stats: StepStats) -> None:
        m, model = self.metrics, stats.model_id
        self.gateway.ceilings.observe(stats)
        self.gateway.companies.observe(stats)
        self.gateway.relief.observe(stats)
        if stats.decode_rows:
            m.batch_occupancy.labels(model).observe(stats.decode_rows)
        if stats.prefill_tokens:
            m.prefill_tokens.labels(model).inc(stats.prefill_tokens)
        if stats.forced_tokens:
            m.forced_tokens.labels(model).inc(stats.forced_tokens)
        m.step_time.labels(model).observe(stats.step_ms / 1e3)
        for stage, ms in stats.stages:
            m.ttft_stage.labels(model, stage).observe(ms / 1e3)
        m.running.labels(model).set(stats.running)
        m.waiting.labels(model).set(stats.waiting)
        m.kv_tokens.labels(model).set(stats.kv_tokens)
        m.kv_capacity.labels(model).set(stats.kv_capacity_tokens)
        if stats.cache is not None:
            m.prefix_cache.take(model, stats.cache)


def _deadlines(config: Config) -> Deadlines:
    return Deadlines(
        load_s=config.load_timeout_s,
        step_s=config.step_timeout_s,
        silence_s=config.silence_timeout_s,
    )
