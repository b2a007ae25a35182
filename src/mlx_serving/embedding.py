"""A request for vectors or for a ranking: its texts through the worker, and what becomes of them.

A text is a sequence that ends with its prompt (`worker.wire.Submit.pooled`), so that it takes turns
with decoding streams, is cancelled and survives a worker's death as they do (docs/adr/0007).
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Sequence
from operator import mul

from mlx_serving.content.embedding import Text, read_embed, read_pairs, read_sides
from mlx_serving.content.text import THREAD_CHARS
from mlx_serving.errors import InvalidRequest, ServerError
from mlx_serving.generation import Served
from mlx_serving.types import (
    Embeddings,
    EmbedRequest,
    ModelInfo,
    Priority,
    Ranked,
    Ranking,
    RankRequest,
    SamplingParams,
    TextPrompt,
    Usage,
)
from mlx_serving.worker.client import SequenceStream
from mlx_serving.worker.port import WorkerClient

STEPS_AHEAD = 4
"""Steps' worth of a request's texts that the worker has at a time: enough to keep it busy, and no
more for another request to wait for than for a prompt of that length."""
_SAMPLING = SamplingParams(max_tokens=1)


def prepare(request: EmbedRequest | RankRequest, served: Served) -> list[Text]:
    """The request's texts as token ids. Raises what the model cannot do, before any work is done."""
    info, tokenizer = served.info, served.text.tokenizer
    if isinstance(request, EmbedRequest):
        _check_embeds(request, info)
        return read_embed(request, info, tokenizer)
    if info.kind == "reranker":
        return read_pairs(request, info, tokenizer)
    if info.kind == "embedder":
        return read_sides(request, info, tokenizer)
    raise InvalidRequest(
        f"'{info.model_id}' is a language model: ranking needs a reranker or an embedding model.",
        param="model",
    )


def prefers_thread(request: EmbedRequest | RankRequest) -> bool:
    """Whether `prepare` would hold up an event loop for about a millisecond or more."""
    if isinstance(request, RankRequest):
        sizes = [len(request.query) + len(document) for document in request.documents]
    else:
        sizes = [
            len(i.text) if isinstance(i, TextPrompt) else len(i.token_ids) for i in request.inputs
        ]
    return sum(sizes) + 16 * len(sizes) >= THREAD_CHARS


async def compute(
    worker: WorkerClient, info: ModelInfo, texts: Sequence[Text], priority: Priority
) -> list[bytes]:
    """The texts' vectors, float32, in their order. Raises what the worker says of one."""
    room = STEPS_AHEAD * info.prefill_step_size
    vectors: list[bytes] = []
    waiting: deque[tuple[SequenceStream, int]] = deque()
    ahead = 0
    try:
        for text in texts:
            size = len(text.token_ids)
            while waiting and ahead + size > room:
                ahead -= waiting[0][1]
                vectors.append(await _vector(waiting[0][0]))
                waiting.popleft()
            stream = worker.submit(
                info.model_id,
                text.token_ids,
                _SAMPLING,
                priority=priority,
                pooled=True,
                second_at=text.second_at,
            )
            waiting.append((stream, size))
            ahead += size
        while waiting:
            vectors.append(await _vector(waiting[0][0]))
            waiting.popleft()
    finally:
        for stream, _ in waiting:
            stream.cancel()
    return vectors


def embeddings(
    request: EmbedRequest, served: Served, texts: Sequence[Text], raw: Sequence[bytes]
) -> Embeddings:
    return Embeddings(
        request_id=request.request_id,
        model=served.info.model_id,
        vectors=tuple(_finish(v, request.dimensions, request.normalize) for v in raw),
        usage=_usage(texts),
    )


def ranking(
    request: RankRequest, served: Served, texts: Sequence[Text], raw: Sequence[bytes]
) -> Ranking:
    if served.info.kind == "reranker":
        scores = [_floats(v)[0] for v in raw]
    else:
        query, *documents = (_finish(v, None, True) for v in raw)
        scores = [sum(map(mul, query, document)) for document in documents]
    ranked = [Ranked(index=i, score=score) for i, score in enumerate(scores)]
    ranked.sort(key=lambda one: (-one.score, one.index))
    return Ranking(
        request_id=request.request_id,
        model=served.info.model_id,
        results=tuple(ranked[: request.top_n]),
        usage=_usage(texts),
    )


def _check_embeds(request: EmbedRequest, info: ModelInfo) -> None:
    if not info.embedding_size:
        why = "ranks texts; use /v1/rerank" if info.kind == "reranker" else "gives no vectors"
        raise InvalidRequest(f"'{info.model_id}' {why}.", param="model")
    if request.dimensions is not None and request.dimensions > info.embedding_size:
        raise InvalidRequest(
            f"'dimensions' is {request.dimensions}; vectors of '{info.model_id}' have "
            f"{info.embedding_size}.",
            param="dimensions",
        )


async def _vector(stream: SequenceStream) -> bytes:
    async for row in stream:
        if row.vector is not None:
            return row.vector
    raise ServerError("The worker gave no vector.")


def _finish(raw: bytes, dimensions: int | None, normalize: bool) -> array[float]:
    vector = _floats(raw)[:dimensions]
    length = math.sqrt(sum(map(mul, vector, vector))) if normalize else 0.0
    return array("f", [x / length for x in vector]) if length else vector


def _floats(raw: bytes) -> array[float]:
    vector = array("f")
    vector.frombytes(raw)
    return vector


def _usage(texts: Sequence[Text]) -> Usage:
    count = sum(len(text.token_ids) for text in texts)
    return Usage(prompt_tokens=count, completion_tokens=0)
