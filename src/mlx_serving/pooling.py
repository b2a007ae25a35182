"""The story of a request for vectors or a ranking: admit, ensure the model, read the texts, compute.

`embedding` says what its texts are and what becomes of their vectors.
"""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

from mlx_serving import clock, embedding
from mlx_serving.content.embedding import Text
from mlx_serving.errors import MLXServingError
from mlx_serving.generation import Served
from mlx_serving.roster import Roster
from mlx_serving.telemetry.events import EventBus, RequestFinished, RequestStarted
from mlx_serving.telemetry.metrics import Metrics
from mlx_serving.telemetry.tally import refusals
from mlx_serving.traffic.admission import Admission
from mlx_serving.types import Embeddings, EmbedRequest, Ranking, RankRequest, Usage
from mlx_serving.worker.port import WorkerClient

Request = EmbedRequest | RankRequest


class Pooling:
    def __init__(
        self,
        slots: Roster,
        admission: Admission,
        worker: WorkerClient,
        metrics: Metrics,
        events: EventBus,
    ) -> None:
        self._slots = slots
        self._admission = admission
        self._worker = worker
        self._metrics = metrics
        self._events = events

    async def embed(self, request: EmbedRequest) -> Embeddings:
        """The vectors of texts. Raises a typed error before any work is done."""
        return embedding.embeddings(request, *await self._vectors(request))

    async def rank(self, request: RankRequest) -> Ranking:
        """Documents in the order in which they answer a query."""
        return embedding.ranking(request, *await self._vectors(request))

    async def _vectors(self, request: Request) -> tuple[Served, list[Text], list[bytes]]:
        """The model, what it read, and a vector for each text. Cancelled with its task."""
        arrived_s = clock.monotonic()
        slot = self._slots.find(request.model)
        with ExitStack() as held:
            with refusals(self._metrics, slot.model_id, request.priority):
                self._admission.enter(arrived_s, request.priority)
                held.callback(self._leave, request)
                served = await slot.acquire()
                held.callback(slot.release, _keep_alive_s(request))
                texts = await _read(request, served)
            tokens = sum(len(text.token_ids) for text in texts)
            started = RequestStarted(
                request_id=request.request_id, model_id=slot.model_id, prompt_tokens=tokens
            )
            self._events.publish(started)
            outcome = "cancelled"
            try:
                raw = await embedding.compute(self._worker, served.info, texts, request.priority)
                outcome = "stop"
            except MLXServingError as error:
                outcome = error.code
                raise
            finally:
                self._end(request, started, outcome, arrived_s)
            self._metrics.pooled_texts.labels(slot.model_id).inc(len(texts))
            return served, texts, raw

    def _leave(self, request: Request) -> None:
        self._admission.leave(clock.monotonic(), request.priority)

    def _end(
        self, request: Request, started: RequestStarted, outcome: str, arrived_s: float
    ) -> None:
        self._events.publish(
            RequestFinished(
                request_id=request.request_id,
                model_id=started.model_id,
                outcome=outcome,
                usage=Usage(prompt_tokens=started.prompt_tokens, completion_tokens=0),
                ttft_ms=None,
                duration_ms=1e3 * (clock.monotonic() - arrived_s),
                priority=request.priority,
                client=request.client,
            )
        )


async def _read(request: Request, served: Served) -> list[Text]:
    if embedding.prefers_thread(request):
        return await asyncio.to_thread(embedding.prepare, request, served)
    return embedding.prepare(request, served)


def _keep_alive_s(request: Request) -> float | None:
    return request.keep_alive_s if isinstance(request, EmbedRequest) else None
