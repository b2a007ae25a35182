"""Which models could draft for which: the same tokens under the same ids, and much smaller."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import msgspec

from mlx_serving.catalog.known import Known

TIMES_SMALLER = 4
"""A draft model worth its while has at most a fourth of the parameters."""


class Candidate(msgspec.Struct, frozen=True):
    name: str
    parameters: int
    vocabulary: str


def drafts_for(target: Candidate, others: Sequence[Candidate]) -> tuple[str, ...]:
    """Names, the smallest model first."""
    fit = [
        other
        for other in others
        if other.vocabulary == target.vocabulary
        and 0 < other.parameters * TIMES_SMALLER <= target.parameters
    ]
    return tuple(other.name for other in sorted(fit, key=lambda c: (c.parameters, c.name)))


class _Model(msgspec.Struct):
    vocab: msgspec.Raw


class _Tokenizer(msgspec.Struct):
    model: _Model


def vocabulary(tokenizer: Path, known: Known) -> str | None:
    """A digest of tokenizer.json's vocabulary; equal for equal ids of equal tokens. None: none there."""
    try:
        record = known.get(tokenizer)
        if record.vocabulary is None:
            record.vocabulary = _digest(tokenizer.read_bytes())
            known.put(tokenizer, record)
    except (OSError, msgspec.DecodeError):
        return None
    return record.vocabulary


def _digest(data: bytes) -> str:
    vocab = msgspec.json.decode(data, type=_Tokenizer).model.vocab
    try:
        ids = msgspec.json.decode(vocab, type=dict[str, int])
    except (
        msgspec.ValidationError
    ):  # Unigram: a list of tokens and scores, in the order of their ids
        return hashlib.sha256(vocab).hexdigest()
    digest = hashlib.sha256()
    for token, token_id in sorted(ids.items(), key=lambda item: item[1]):
        digest.update(f"{token_id}:{token}\n".encode())
    return digest.hexdigest()
