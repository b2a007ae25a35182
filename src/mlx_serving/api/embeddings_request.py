"""The bodies of /v1/embeddings and /v1/rerank → requests for vectors and rankings."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from mlx_serving.api import embeddings_fields as fields
from mlx_serving.api.body import convert, read_object
from mlx_serving.api.disposition import check
from mlx_serving.api.wishes import parse_priority
from mlx_serving.errors import InvalidRequest
from mlx_serving.types import MAX_INPUTS, EmbedRequest, RankRequest, TextPrompt, TokenPrompt

_MAX_INT = 2**31 - 1
ALL = _MAX_INT
"""To keep as many tokens as the model takes."""

Model = Annotated[str, Meta(min_length=1)]
Count = Annotated[int, Meta(ge=1, le=_MAX_INT)]
Truncate = Annotated[int, Meta(ge=-1, le=_MAX_INT)]
_TOKEN = {"type": "integer", "minimum": 0}
_ITEM = {"anyOf": [{"type": "string"}, _TOKEN, {"type": "array", "minItems": 1, "items": _TOKEN}]}
Inputs = Annotated[list[Any], Meta(min_length=1, extra_json_schema={"items": _ITEM})]


class EmbedCall(msgspec.Struct, frozen=True, kw_only=True):
    request: EmbedRequest
    base64: bool
    advisory: tuple[str, ...]


class RankCall(msgspec.Struct, frozen=True, kw_only=True):
    request: RankRequest
    return_documents: bool
    advisory: tuple[str, ...]


class _Embeddings(msgspec.Struct, kw_only=True):
    input: str | Inputs
    model: Model | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Count | None = None
    normalize: bool | None = None
    truncate_prompt_tokens: Truncate | None = None
    prompt_name: str | None = None
    priority: str | int | None = None
    user: Any = None


class _Document(msgspec.Struct, kw_only=True):
    text: str


class _Rerank(msgspec.Struct, kw_only=True):
    query: Annotated[str, Meta(min_length=1)]
    documents: Annotated[list[str | _Document], Meta(min_length=1, max_length=MAX_INPUTS)]
    model: Model | None = None
    top_n: Count | None = None
    return_documents: bool | None = None
    max_tokens_per_doc: Count | None = None
    truncate_prompt_tokens: Truncate | None = None
    instruction: Annotated[str, Meta(min_length=1)] | None = None
    priority: str | int | None = None
    user: Any = None


SHAPES: Mapping[str, type[msgspec.Struct]] = {
    "/v1/embeddings": _Embeddings,
    "/v1/rerank": _Rerank,
    "/v2/rerank": _Rerank,
    "/rerank": _Rerank,
    "/v1/rerank documents[]": _Document,
}


def parse_embeddings(data: bytes, *, default_model: str) -> EmbedCall:
    """Raises InvalidRequest, UnsupportedParameter."""
    raw = read_object(data)
    advisory = check(fields.EMBEDDINGS, raw)
    body = convert(raw, _Embeddings)
    inputs, single = _inputs(body.input)
    request = EmbedRequest(
        request_id="embd-" + secrets.token_hex(12),
        model=body.model or default_model,
        inputs=inputs,
        single=single,
        dimensions=body.dimensions,
        normalize=body.normalize is not False,
        truncate=_truncate(body.truncate_prompt_tokens),
        prompt_name=body.prompt_name,
        priority=parse_priority(body.priority),
    )
    base64 = body.encoding_format == "base64"
    return EmbedCall(request=request, base64=base64, advisory=tuple(advisory))


def parse_rerank(data: bytes, *, default_model: str) -> RankCall:
    """Raises InvalidRequest, UnsupportedParameter."""
    raw = read_object(data)
    advisory = check(fields.RERANK, raw)
    body = convert(raw, _Rerank)
    for i, document in enumerate(raw["documents"]):
        if isinstance(document, dict):
            check(fields.DOCUMENT, document, at=f"documents[{i}].")
    request = RankRequest(
        request_id="rerank-" + secrets.token_hex(12),
        model=body.model or default_model,
        query=body.query,
        documents=tuple(d if isinstance(d, str) else d.text for d in body.documents),
        top_n=body.top_n,
        truncate=_truncate(body.truncate_prompt_tokens),
        max_document_tokens=body.max_tokens_per_doc,
        instruction=body.instruction,
        priority=parse_priority(body.priority),
    )
    wanted = body.return_documents is not False
    return RankCall(request=request, return_documents=wanted, advisory=tuple(advisory))


def _inputs(given: str | list[Any]) -> tuple[tuple[TextPrompt | TokenPrompt, ...], bool]:
    """The inputs, and whether there is one that is not in a list."""
    if isinstance(given, str):
        return (TextPrompt(text=given),), True
    if _is_token(given[0]):
        return (_tokens(given, "input"),), True
    if len(given) > MAX_INPUTS:
        raise InvalidRequest(
            f"'input' has {len(given)} items; at most {MAX_INPUTS}.", param="input"
        )
    kind = type(given[0])
    found: list[TextPrompt | TokenPrompt] = []
    for i, item in enumerate(given):
        if type(item) is not kind or not isinstance(item, str | list):
            raise InvalidRequest(
                f"'input[{i}]' must be a text or a list of token ids, like the items before it.",
                param=f"input[{i}]",
            )
        if isinstance(item, str):
            found.append(TextPrompt(text=item))
        else:
            found.append(_tokens(item, f"input[{i}]"))
    return tuple(found), False


def _tokens(given: list[Any], at: str) -> TokenPrompt:
    if not given:
        raise InvalidRequest(f"'{at}' has no token ids.", param=at)
    for i, token in enumerate(given):
        if not _is_token(token) or not 0 <= token <= _MAX_INT:
            raise InvalidRequest(f"'{at}[{i}]' must be a token id.", param=f"{at}[{i}]")
    return TokenPrompt(token_ids=tuple(given))


def _is_token(item: Any) -> bool:
    return isinstance(item, int) and not isinstance(item, bool)


def _truncate(given: int | None) -> int | None:
    if given == 0:
        raise InvalidRequest(
            "'truncate_prompt_tokens' must be at least 1, or -1.", param="truncate_prompt_tokens"
        )
    return ALL if given == -1 else given
