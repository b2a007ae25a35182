"""What becomes of every field of /v1/embeddings and /v1/rerank."""

from __future__ import annotations

from collections.abc import Mapping

from mlx_serving.api.disposition import Row, Table, table

_PRIORITY = "critical, high, normal, low; or an integer, as /v1/chat/completions has it"
_ADVISORY: dict[str, Row] = {"user": "an end user's identifier"}

EMBEDDINGS: Table = table(
    (
        "honoured",
        {
            "model": "a served model's id or alias; default: the first served model",
            "input": "a text, token ids, or up to 2,048 of either; token ids are taken as they are",
            "encoding_format": "float (default), or base64: float32, little-endian",
            "dimensions": "that many numbers of each vector, its first ones, scaled to length 1 again",
            "normalize": "default true: vectors have length 1; false: as the model pools them",
            "truncate_prompt_tokens": "tokens to keep of a longer text, its end being cut; -1: as many as the model takes; default: a text that is too long is a 400",
            "prompt_name": "which of the model's own prompts (config_sentence_transformers.json) precedes each text; default: its default one, if any",
            "priority": _PRIORITY,
        },
    ),
    ("advisory", dict(_ADVISORY)),
    (
        "refused",
        {
            "add_special_tokens": ("send token ids for a text without them", (True,)),
            "messages": "send texts as input",
            "input_type": "see prompt_name",
            "instruction": "put it before the text, or see prompt_name",
        },
    ),
)

RERANK: Table = table(
    (
        "honoured",
        {
            "model": "a served model's id or alias; default: the first served model",
            "query": "a text",
            "documents": "1 to 2,048 texts, or objects with a text",
            "top_n": "how many of the best to return; default: all",
            "return_documents": "default true: each result has its document",
            "max_tokens_per_doc": "tokens to keep of a longer document, its end being cut",
            "truncate_prompt_tokens": "tokens to keep of a query and its document together, the document being cut; -1: as many as the model takes; default: a longer one is a 400",
            "instruction": "the task, for rerankers that are language models and take one; a 400 with others",
            "priority": _PRIORITY,
        },
    ),
    ("advisory", dict(_ADVISORY)),
    (
        "refused",
        {
            "rank_fields": ("documents are texts", (["text"],)),
            "max_chunks_per_doc": ("a document is one piece", (1,)),
            "overlap_tokens": ("a document is one piece", (0,)),
        },
    ),
)

DOCUMENT: Table = table(("honoured", {"text": "the document"}))

ROUTES: Mapping[str, Table] = {
    "/v1/embeddings": EMBEDDINGS,
    "/v1/rerank": RERANK,
    "/v2/rerank": RERANK,
    "/rerank": RERANK,
    "/v1/rerank documents[]": DOCUMENT,
}
