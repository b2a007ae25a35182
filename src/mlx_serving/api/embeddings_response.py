"""Vectors and rankings → JSON."""

from __future__ import annotations

import asyncio
from array import array
from base64 import b64encode
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from mlx_serving.api.embeddings_request import RankCall
from mlx_serving.types import Embeddings, Ranking

_json = msgspec.json.Encoder().encode
_FLOATS_AT_ONCE = 32_768
"""That are written before other requests get their turn."""


class Usage(msgspec.Struct):
    prompt_tokens: int
    total_tokens: int


class EmbeddingItem(msgspec.Struct):
    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class EmbeddingList(msgspec.Struct, kw_only=True):
    """The answer of /v1/embeddings, as it is told in /openapi.json."""

    object: Literal["list"] = "list"
    data: list[EmbeddingItem]
    model: str
    usage: Usage


class Document(msgspec.Struct):
    text: str


class RankedDocument(msgspec.Struct, omit_defaults=True):
    index: int
    relevance_score: float
    document: Document | None = None


class RankedList(msgspec.Struct):
    id: str
    model: str
    results: list[RankedDocument]
    usage: Usage


SHAPES: Mapping[str, type[msgspec.Struct]] = {
    "/v1/embeddings": EmbeddingList,
    "/v1/rerank": RankedList,
    "/v2/rerank": RankedList,
    "/rerank": RankedList,
}


async def embedding_list(found: Embeddings, *, base64: bool) -> bytes:
    if base64:
        vectors = [b'"' + b64encode(vector.tobytes()) + b'"' for vector in found.vectors]
    else:
        vectors = await numbers(found.vectors)
    items = [
        b'{"object":"embedding","index":%d,"embedding":%s}' % (i, vector)
        for i, vector in enumerate(vectors)
    ]
    usage = Usage(found.usage.prompt_tokens, found.usage.total_tokens)
    end = (_json(found.model), _json(usage))
    return b'{"object":"list","data":[%s],"model":%s,"usage":%s}' % (b",".join(items), *end)


async def numbers(vectors: Sequence[array[float]]) -> list[bytes]:
    """Each vector as a JSON array."""
    written: list[bytes] = []
    since = 0
    for vector in vectors:
        written.append(_json(vector.tolist()))
        since += len(vector)
        if since >= _FLOATS_AT_ONCE:
            since = 0
            await asyncio.sleep(0)
    return written


def ranked_list(call: RankCall, found: Ranking) -> bytes:
    texts = call.request.documents if call.return_documents else None
    results = [
        RankedDocument(one.index, one.score, Document(texts[one.index]) if texts else None)
        for one in found.results
    ]
    usage = Usage(found.usage.prompt_tokens, found.usage.total_tokens)
    return _json(RankedList(found.request_id, found.model, results, usage))
