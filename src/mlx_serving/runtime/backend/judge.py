"""Rerankers that are language models: asked whether a document answers a query, the odds of yes.

Their folders look like a chat model's. A folder counts as one if its chat template reads the roles
query and document, if its config names the two tokens (`classifier_from_token`, vLLM's word), or by
the family's name in its path; `content/judged.py` knows how each family is asked. One whose
vocabulary was traded for a classifier of one score is told by its class.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_serving.errors import ModelBroken
from mlx_serving.runtime.backend.loader import read_json
from mlx_serving.runtime.backend.pooling import Dense, Pooling, score_activation
from mlx_serving.types import RankForm

_FORMS: Mapping[str, tuple[RankForm, re.Pattern[str], str, str | None]] = {
    "qwen3": ("qwen3", re.compile(r"qwen3[-_.]?reranker", re.IGNORECASE), "yes", "no"),
    "gemma": ("bge-gemma", re.compile(r"bge-reranker-v2-gemma", re.IGNORECASE), "Yes", None),
}
"""By the model's type: the form of the question, the family's name, the two answers."""
_CLASSIFIERS: Mapping[str, RankForm] = {"Qwen3ForSequenceClassification": "qwen3"}
"""By the class that the config names."""
HEAD = "score.weight"
_ROLES = tuple(re.compile(rf"['\"]{role}['\"]") for role in ("query", "document"))


@dataclass(frozen=True, slots=True)
class Judge:
    form: RankForm
    yes: int
    no: int | None
    """None: yes is weighed against nothing, as that family was trained."""

    def __call__(self, logits: mx.array) -> mx.array:
        """`[1, vocabulary]` to `[1]`: how likely yes is."""
        margin = logits[:, self.yes].astype(mx.float32)
        if self.no is not None:
            margin = margin - logits[:, self.no].astype(mx.float32)
        return mx.sigmoid(margin)


@dataclass(frozen=True, slots=True)
class Classifier:
    form: RankForm
    pooling: Pooling
    """From a question's hidden states to its score."""


def is_classifier(config: Mapping[str, Any]) -> bool:
    return _classified(config) is not None


def _classified(config: Mapping[str, Any]) -> RankForm | None:
    names = config.get("architectures")
    return _CLASSIFIERS.get(str(names[0])) if isinstance(names, list) and names else None


def read_judge(path: Path, config: Mapping[str, Any]) -> Judge | Classifier | None:
    """None for a model that is no such reranker. Raises ModelBroken for one without its answers."""
    if (classified := _classified(config)) is not None:
        return Classifier(classified, _last_token_score(path, config))
    known = _FORMS.get(str(config.get("model_type")))
    if known is None:
        return None
    form, name, yes, no = known
    named = any(name.search(part) for part in path.resolve().parts[-4:])
    if not named and config.get("classifier_from_token") != [no, yes] and not _asks(path):
        return None
    ids = [None if word is None else _token_id(path, word) for word in (yes, no)]
    assert ids[0] is not None, "every family has a yes"
    return Judge(form, ids[0], ids[1])


def _last_token_score(path: Path, config: Mapping[str, Any]) -> Pooling:
    shards: list[Any] = [mx.load(str(file)) for file in sorted(path.glob("model*.safetensors"))]
    weight = next((shard[HEAD] for shard in shards if HEAD in shard), None)
    if weight is None or not mx.issubdtype(weight.dtype, mx.floating):
        raise ModelBroken(f"{path} has no {HEAD} of plain numbers, a classifier's head")
    if weight.shape[0] != 1:
        raise ModelBroken(
            f"{path} sorts texts into {weight.shape[0]} classes; a reranker gives one score"
        )
    return Pooling(
        "last", (Dense(weight.astype(mx.float32), None, score_activation(path, config)),)
    )


def _asks(path: Path) -> bool:
    """Whether the chat template has a query and a document instead of turns."""
    file = path / "chat_template.jinja"
    if file.is_file():
        template: object = file.read_text(encoding="utf-8", errors="replace")
    else:
        template = read_json(path / "tokenizer_config.json").get("chat_template")
    return isinstance(template, str) and all(role.search(template) for role in _ROLES)


def _token_id(path: Path, word: str) -> int:
    file = path / "tokenizer.json"
    vocabulary = read_json(file).get("model", {}).get("vocab")
    found = vocabulary.get(word) if isinstance(vocabulary, dict) else None
    if not isinstance(found, int):
        raise ModelBroken(f"{file} has no token {word!r}, with which a reranker answers")
    return found
