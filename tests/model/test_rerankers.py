"""Rerankers that are language models: their official prompts, written out by hand, through mlx-lm's own
model, against what the engine makes of a query and documents."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tokenizers as hf
from mlx.utils import tree_flatten
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from byte_vocabulary import letters
from mlx_serving import SyncEngine, errors
from mlx_serving.errors import ModelBroken
from mlx_serving.runtime.backend import loader
from mlx_serving.worker.wire import ModelOptions
from model import zoo

SPECIALS = ("<|im_start|>", "<|im_end|>", "<bos>")
TASK = "Given a web search query, retrieve relevant passages that answer the query"
DOCUMENTS = ["Paris is a city.", "0 is a number", "ünï: <Document>:", "A long one. " * 9]


def qwen3(query: str, document: str, task: str = TASK) -> str:
    return (
        '<|im_start|>system\nJudge whether the Document meets the requirements based on the Query '
        'and the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
        f"<|im_start|>user\n<Instruct>: {task}\n<Query>: {query}\n<Document>: {document}<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )  # fmt: skip


def gemma(query: str, document: str) -> str:
    return (
        f"<bos>A: {query}\nB: {document}\nGiven a query A and a passage B, determine whether the "
        "passage contains an answer to the query by providing a prediction of either 'Yes' or 'No'."
    )


def write_tokenizer(folder: Path, *, answers: bool = True) -> hf.Tokenizer:
    """Bytes, and the answers as tokens of their own."""
    pairs = [("y", "e"), ("ye", "s"), ("n", "o"), ("Y", "e"), ("Ye", "s")] if answers else []
    vocab = {letter: byte for byte, letter in letters().items()}
    for one, other in pairs:
        vocab[one + other] = len(vocab)
    tokenizer = hf.Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    return tokenizer


def write(
    folder: Path, name: str, *, answers: bool = True, labels: int = 0, **files: Any
) -> tuple[Any, Any]:
    """A folder, and mlx-lm's model and the tokenizer that are in it. `labels`: of a classifier's head, in
    place of the language model's."""
    folder.mkdir(parents=True)
    sizes = {"model_type": name, "vocab_size": 272, "max_position_embeddings": 700}
    more = files.pop("config", {})
    model = zoo.build("qwen3", **sizes)
    arrays = dict(tree_flatten(model.parameters()))
    if labels:
        arrays.pop("lm_head.weight", None)
        arrays["score.weight"] = mx.random.normal((labels, zoo.config("qwen3")["hidden_size"]))
        more = {"architectures": ["Qwen3ForSequenceClassification"], **more}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    config = {**zoo.config("qwen3"), **sizes, "eos_token_id": 0, **more}
    settings = {"bos_token": "<bos>"} | files.pop("tokenizer_config", {})
    for file, value in {"config.json": config, "tokenizer_config.json": settings, **files}.items():
        (folder / file).write_text(json.dumps(value))
    return model, write_tokenizer(folder, answers=answers)


def likely(model: Any, tokenizer: hf.Tokenizer, text: str, yes: str, no: str | None) -> float:
    """How likely `yes` is after the text, against `no`."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    logits = np.array(model(mx.array([ids]))[0, -1]).astype(np.float64)
    odds = logits[tokenizer.token_to_id(yes)]
    odds -= 0 if no is None else logits[tokenizer.token_to_id(no)]
    return float(1 / (1 + np.exp(-odds)))


Served = dict[str, tuple[Any, hf.Tokenizer]]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[SyncEngine, Served]]:
    """An engine of all three, and what is in their folders."""
    parent = tmp_path_factory.mktemp("rerankers")
    kinds = {"Qwen3-Reranker-0.6B-4bit": "qwen3", "bge-reranker-v2-gemma": "gemma", "m": "qwen3"}
    found = {name: write(parent / name, kind) for name, kind in kinds.items()}
    paths = [str(parent / name) for name in kinds]
    with SyncEngine(paths, prefill_step_size=64, supervise=False) as engine:
        yield engine, found


@pytest.mark.parametrize(
    ("name", "form", "answers"),
    [
        ("Qwen3-Reranker-0.6B-4bit", qwen3, ("yes", "no")),
        ("bge-reranker-v2-gemma", gemma, ("Yes", None)),
    ],
)
def test_scores_are_the_answers_odds(
    served: tuple[SyncEngine, Served], name: str, form: Callable[[str, str], str], answers: Any
) -> None:
    engine, found = served
    model, tokenizer = found[name]
    expected = [likely(model, tokenizer, form("Which city?", d), *answers) for d in DOCUMENTS]
    ranking = engine.rerank("Which city?", DOCUMENTS, model=name)
    scores = {ranked.index: ranked.score for ranked in ranking.results}
    assert [scores[i] for i in range(len(DOCUMENTS))] == pytest.approx(expected, abs=1e-4)
    assert [r.index for r in ranking.results] == list(np.argsort(expected)[::-1])
    assert max(expected) - min(expected) > 0.01, "the documents count"
    alone = engine.rerank("Which city?", DOCUMENTS[:1], model=name).results[0].score
    assert alone == scores[0], "and its neighbours do not"
    sizes = [len(tokenizer.encode(form("Which city?", d)).ids) for d in DOCUMENTS]
    assert ranking.usage.prompt_tokens == sum(sizes)


def test_instructions_cuts_and_control_tokens(served: tuple[SyncEngine, Served]) -> None:
    engine, found = served
    name = "Qwen3-Reranker-0.6B-4bit"
    model, tokenizer = found[name]
    size = len(tokenizer.encode(qwen3("q", "")).ids) - 1  # less the space

    def score(document: str, **more: Any) -> float:
        return engine.rerank("q", [document], model=name, **more).results[0].score

    asked = score("d", instruction="Find code.")
    expected = likely(model, tokenizer, qwen3("q", "d", "Find code."), "yes", "no")
    assert asked == pytest.approx(expected, abs=1e-4)
    assert asked != pytest.approx(score("d"), abs=1e-5)
    # A document is cut at its end, its first token being the space.
    assert score("xyz" * 9, truncate=size + 4) == score("xyz")
    with pytest.raises(errors.InvalidRequest) as caught:
        score("xyz", truncate=size)
    assert caught.value.param == "documents[0]"
    with pytest.raises(errors.ContextOverflow):
        score("x" * 700)
    # What looks like control tokens are characters in a client's text.
    used = engine.rerank("q", ["<|im_end|>"], model=name).usage.prompt_tokens
    assert used == size + 1 + len("<|im_end|>")


def test_a_classifiers_scores_are_its_heads(tmp_path: Path) -> None:
    """What its one row makes of the question's last state, through a sigmoid."""
    folder = tmp_path / "tuned"
    model, tokenizer = write(folder, "qwen3", labels=1)
    weights: Any = mx.load(str(folder / "model.safetensors"))
    row = np.array(weights["score.weight"][0]).astype(np.float64)

    def expected(document: str, *more: str) -> float:
        ids = tokenizer.encode(qwen3("Which city?", document, *more), add_special_tokens=False).ids
        state = np.array(model.model(mx.array([ids]))[0, -1]).astype(np.float64)
        return float(1 / (1 + np.exp(-state @ row)))

    with SyncEngine(str(folder), prefill_step_size=64, supervise=False) as engine:
        ranking = engine.rerank("Which city?", DOCUMENTS)
        scores = {ranked.index: ranked.score for ranked in ranking.results}
        wanted = [expected(document) for document in DOCUMENTS]
        assert [scores[i] for i in range(len(DOCUMENTS))] == pytest.approx(wanted, abs=1e-4)
        assert max(wanted) - min(wanted) > 0.01, "the documents count"
        told = engine.rerank("Which city?", DOCUMENTS[:1], instruction="Find code.").results[0]
        assert told.score == pytest.approx(expected(DOCUMENTS[0], "Find code."), abs=1e-4)
        for call in (engine.chat, engine.embed):
            with pytest.raises(errors.InvalidRequest, match="/v1/rerank"):
                call("Hi")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"labels": 3}, "3 classes"),
        ({"config": {"architectures": ["Qwen3ForSequenceClassification"]}}, "score.weight"),
    ],
)
def test_a_classifier_that_gives_no_score_is_broken(tmp_path: Path, files: Any, said: str) -> None:
    write(tmp_path / "m", "qwen3", **files)
    with pytest.raises(ModelBroken, match=said):
        loader.load("m", tmp_path / "m", ModelOptions(kernels="off"), lambda *_: None)


def test_each_says_what_it_is_for(served: tuple[SyncEngine, Served]) -> None:
    engine, _ = served
    for call in (engine.chat, engine.embed):
        with pytest.raises(errors.InvalidRequest, match="/v1/rerank"):
            call("Hi", model="bge-reranker-v2-gemma")
    with pytest.raises(errors.InvalidRequest, match="language model"):
        engine.rerank("q", ["d"], model="m")
    with pytest.raises(errors.InvalidRequest) as caught:
        engine.rerank("q", ["d"], model="bge-reranker-v2-gemma", instruction="Find it.")
    assert caught.value.param == "instruction"


@pytest.mark.parametrize(
    "files",
    [
        {"config": {"classifier_from_token": ["no", "yes"]}},
        {"tokenizer_config": {"chat_template": "{% if m.role == 'query' or 'document' %}"}},
    ],
)
def test_a_folder_may_say_so_itself(tmp_path: Path, files: Any) -> None:
    write(tmp_path / "m", "qwen3", **files)
    info = loader.load("m", tmp_path / "m", ModelOptions(kernels="off"), lambda *_: None).info
    assert (info.kind, info.rank_form, info.embedding_size) == ("reranker", "qwen3", 0)


def test_others_are_what_they_were(tmp_path: Path) -> None:
    for kind, name in (("llama", "qwen3-reranker"), ("gemma", "qwen3-reranker-g")):
        write(tmp_path / name, kind)
        info = loader.load("m", tmp_path / name, ModelOptions(kernels="off"), lambda *_: None).info
        assert (info.kind, info.rank_form) == ("decoder", "")


def test_one_without_its_answers_is_broken(tmp_path: Path) -> None:
    write(tmp_path / "qwen3-reranker", "qwen3", answers=False)
    with pytest.raises(ModelBroken, match="'yes'"):
        loader.load("m", tmp_path / "qwen3-reranker", ModelOptions(kernels="off"), lambda *_: None)
