"""A query and a document as a reranker that is a language model is asked about them.

Each family was trained on one form of the question. The client's texts are read as plain
characters: a control token in a document ends nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mlx_serving.content.tokenizer import Tokenizer
from mlx_serving.types import RankForm


@dataclass(frozen=True, slots=True)
class Question:
    before: str
    """Up to the query; with {instruction} where the family takes one."""
    between: str
    after: str
    instruction: str = ""
    """Where the client gives none."""
    begins: bool = False
    """With the beginning-of-sequence token."""


QUESTIONS: Mapping[RankForm, Question] = {
    "qwen3": Question(
        before=(
            "<|im_start|>system\nJudge whether the Document meets the requirements based on the "
            'Query and the Instruct provided. Note that the answer can only be "yes" or "no".'
            "<|im_end|>\n<|im_start|>user\n<Instruct>: {instruction}\n<Query>:"
        ),
        between="\n<Document>:",
        after="<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        instruction="Given a web search query, retrieve relevant passages that answer the query",
    ),
    "bge-gemma": Question(
        before="A:",
        between="\nB:",
        after=(
            "\nGiven a query A and a passage B, determine whether the passage contains an answer "
            "to the query by providing a prediction of either 'Yes' or 'No'."
        ),
        begins=True,
    ),
}


def takes_instruction(form: RankForm) -> bool:
    return form in QUESTIONS and bool(QUESTIONS[form].instruction)


@dataclass(frozen=True, slots=True)
class Asked:
    """A question about one query, ready for documents."""

    before: list[int]
    after: list[int]


def ask(form: RankForm, query: str, instruction: str | None, tokenizer: Tokenizer) -> Asked:
    """Raises InvalidRequest for text that is not valid Unicode."""
    question = QUESTIONS[form]
    before, slot, rest = question.before.partition("{instruction}")
    ids = _own(before, tokenizer)
    if slot:
        ids += _theirs(instruction or question.instruction, tokenizer) + _own(rest, tokenizer)
    if question.begins and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id, *ids]
    ids += _theirs(" " + query, tokenizer) + _own(question.between, tokenizer)
    return Asked(ids, _own(question.after, tokenizer))


def document_ids(document: str, tokenizer: Tokenizer) -> list[int]:
    return _theirs(" " + document, tokenizer)


def _own(text: str, tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def _theirs(text: str, tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, parse_special_tokens=False)
