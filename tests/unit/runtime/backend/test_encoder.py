"""Encoders against a slow one in numpy, and a text's vector beside any neighbours."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import numpy as np
import pytest
from mlx.nn.layers.quantized import quantize

import encoders
from mlx_serving.errors import ModelBroken
from mlx_serving.runtime.backend import loader
from mlx_serving.runtime.backend.encoder import Encoder, EncoderConfig, pack, rename
from mlx_serving.runtime.backend.model import LoadedModel
from mlx_serving.runtime.core.plan import PrefillChunk, RowStart, StepPlan
from mlx_serving.types import SamplingParams
from mlx_serving.worker.wire import ModelOptions

NATIVE = mx.default_device() == mx.Device(mx.cpu)
KERNELS = ("auto", "off") if NATIVE else ("auto",)
TOLERANCE = 2e-5
"""Of one number of a vector whose length is about 5."""


def load(folder: Path, kernels: str = "auto", **options: Any) -> LoadedModel:
    settings = ModelOptions(kernels=kernels, **options)
    return loader.load("m", folder, settings, lambda phase, detail: None)


def run(
    model: LoadedModel,
    texts: Sequence[Sequence[int]],
    second_at: Sequence[int | None] | None = None,
) -> list[np.ndarray]:
    """Each text's vector, all in one step."""
    at = second_at or [None] * len(texts)
    tuples = [tuple(text) for text in texts]
    starts = tuple(
        RowStart(i, i, t, len(t), SamplingParams(), second_at=at[i]) for i, t in enumerate(tuples)
    )
    chunks = tuple(
        PrefillChunk(i, i, t, 0, samples=True, pooled=True) for i, t in enumerate(tuples)
    )
    result = model.runner.launch(StepPlan(0, starts=starts, prefill=chunks)).wait()
    vectors = {one.seq_id: one.vector for one in result.sampled}
    return [np.frombuffer(vectors[i] or b"", "<f4") for i in range(len(texts))]


def texts(count: int = 12, longest: int = 30, seed: int = 3) -> list[list[int]]:
    rng = random.Random(seed)
    lengths = [1, 2, longest, *(rng.randint(2, longest) for _ in range(count - 3))]
    return [[2, *(rng.randrange(4, 64) for _ in range(n - 1))] for n in lengths]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("family", ["bert", "xlm-roberta", "roberta"])
def test_vectors_are_the_oracles(tmp_path: Path, family: str, kernels: str) -> None:
    folder = encoders.write(tmp_path / family, family)
    oracle, model = encoders.Oracle(folder), load(folder, kernels)
    assert (model.info.kind, model.info.embedding_size) == ("embedder", 32)
    assert model.info.context_length == model.info.max_input_tokens == 32
    for text, vector in zip(texts(), run(model, texts()), strict=True):
        assert vector == pytest.approx(oracle.states(text).mean(0), abs=TOLERANCE)


@pytest.mark.parametrize(
    ("pooling", "pool"),
    [
        ("cls_token", lambda states: states[0]),
        ("mean_tokens", lambda states: states.mean(0)),
        ("max_tokens", lambda states: states.max(0)),
        ("lasttoken", lambda states: states[-1]),
    ],
)
def test_the_folder_says_how_to_pool(tmp_path: Path, pooling: str, pool: Any) -> None:
    folder = encoders.write(tmp_path / "m", pooling=pooling)
    oracle = encoders.Oracle(folder)
    for text, vector in zip(texts(5), run(load(folder), texts(5)), strict=True):
        assert vector == pytest.approx(pool(oracle.states(text)), abs=TOLERANCE)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
def test_a_cross_encoders_scores_are_the_oracles(tmp_path: Path, family: str, kernels: str) -> None:
    folder = encoders.write(tmp_path / family, family, labels=1)
    oracle, model = encoders.Oracle(folder), load(folder, kernels)
    assert (model.info.kind, model.info.embedding_size) == ("reranker", 0)
    pairs = texts()
    cuts = [len(pair) // 2 if family == "bert" and len(pair) > 2 else None for pair in pairs]
    for pair, cut, vector in zip(pairs, cuts, run(model, pairs, cuts), strict=True):
        first = len(pair) if cut is None else cut
        logit = oracle.score(pair, [0] * first + [1] * (len(pair) - first))
        assert vector == pytest.approx([1 / (1 + math.exp(-logit))], abs=TOLERANCE)
    if family == "bert":
        assert run(model, [pairs[2]])[0] != pytest.approx(run(model, [pairs[2]], [9])[0])


def test_a_cross_encoder_may_ask_for_the_bare_logit(tmp_path: Path) -> None:
    asked = {"activation_fn": "torch.nn.modules.linear.Identity"}
    folder = encoders.write(tmp_path / "m", labels=1, sentence_transformers=asked)
    text = texts()[2]
    logit = encoders.Oracle(folder).score(text, [0] * len(text))
    assert run(load(folder), [text])[0] == pytest.approx([logit], abs=TOLERANCE)


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_vector_does_not_depend_on_its_neighbours(tmp_path: Path, kernels: str) -> None:
    """The same bits where our kernels compute every product; elsewhere as far as a BLAS that blocks by
    rows goes, which `exact_batch` mends."""
    folder = encoders.write(tmp_path / "m")
    model, rng = load(folder, kernels), random.Random(1)
    everyone = texts(24)
    alone = [run(model, [text])[0] for text in everyone]
    assert model.info.batch_invariant is (model.info.kernels != "mlx")
    for _ in range(6):
        some = rng.sample(range(len(everyone)), rng.randint(2, 24))
        for i, vector in zip(some, run(model, [everyone[i] for i in some]), strict=True):
            if model.info.batch_invariant:
                assert np.array_equal(vector, alone[i]), i
            else:
                assert vector == pytest.approx(alone[i], abs=TOLERANCE), i


def test_exact_batch_is_bit_equal_on_stock_kernels(tmp_path: Path) -> None:
    model = load(encoders.write(tmp_path / "m"), "off", exact_batch=True)
    assert model.info.batch_invariant
    alone = [run(model, [text])[0] for text in texts()]
    for one, other in zip(alone, run(model, texts()), strict=True):
        assert np.array_equal(one, other)


def test_quantised_weights_are_read(tmp_path: Path) -> None:
    wide = {"hidden_size": 64, "intermediate_size": 64}
    folder = encoders.write(tmp_path / "m", **wide)
    stored: Any = mx.load(str(folder / "model.safetensors"))
    model = Encoder(msgspec.convert(encoders.config(**wide), EncoderConfig))
    model.load_weights(list(rename(stored, 0).items()))
    quantize(model, 32, 8)
    text = texts()[2]
    (states,) = model(pack([text], [None]))
    written = {}
    for name, array in stored.items():
        if array.ndim == 2 and name.endswith(".weight"):
            at = name.removesuffix("weight")
            names = (name, f"{at}scales", f"{at}biases")
            written |= zip(names, mx.quantize(array, 32, 8), strict=True)
        else:
            written[name] = array
    mx.save_safetensors(str(folder / "model.safetensors"), written)
    config = json.loads((folder / "config.json").read_text())
    config["quantization"] = {"group_size": 32, "bits": 8}
    (folder / "config.json").write_text(json.dumps(config))
    (vector,) = run(load(folder, "off"), [text])
    assert vector == pytest.approx(np.array(states.mean(1)[0]), abs=TOLERANCE)


def test_a_dense_layer_follows_the_pooling(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    modules = [
        {"type": "sentence_transformers.models.Transformer", "path": ""},
        {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},
        {"type": "sentence_transformers.models.Dense", "path": "2_Dense"},
    ]
    files = {
        "modules.json": modules,
        "1_Pooling/config.json": {"pooling_mode_cls_token": True},
        "2_Dense/config.json": {"activation_function": "torch.nn.modules.activation.Tanh"},
    }
    folder = encoders.write(tmp_path / "m", files=files)
    weight, bias = rng.normal(0, 0.2, (8, 32)), rng.normal(0, 0.2, 8)
    arrays = {"linear.weight": weight.astype(np.float32), "linear.bias": bias.astype(np.float32)}
    encoders.save(folder / "2_Dense" / "model.safetensors", arrays)
    model = load(folder)
    assert model.info.embedding_size == 8
    first = encoders.Oracle(folder).states(texts()[2])[0]
    expected = np.tanh(weight @ first + bias)
    assert run(model, [texts()[2]])[0] == pytest.approx(expected, abs=TOLERANCE)


def test_lengths_and_prompts_are_the_folders(tmp_path: Path) -> None:
    files = {
        "sentence_bert_config.json": {"max_seq_length": 20},
        "config_sentence_transformers.json": {
            "prompts": {"query": "w1 ", "document": ""},
            "default_prompt_name": "query",
        },
    }
    info = load(encoders.write(tmp_path / "m", files=files)).info
    assert (info.context_length, info.max_input_tokens) == (20, 20)
    assert (dict(info.prompts), info.default_prompt) == ({"query": "w1 "}, "query")
    assert load(encoders.write(tmp_path / "n"), context_length=9).info.context_length == 9


def test_a_folder_need_not_name_a_class(tmp_path: Path) -> None:
    folder = encoders.write(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))
    assert load(folder).info.kind == "embedder"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"position_embedding_type": "relative_key"}, "relative_key positions"),
        ({"hidden_act": "swish"}, "'swish'"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps"),
        ({"num_hidden_layers": 3}, "layers.2"),
        ({"labels": 3}, "3 classes"),
        ({"files": {"modules.json": [{"type": "x.CNN"}]}}, "CNN"),
        ({"files": {"modules.json": {}}}, "modules.json"),
        ({"pooling": "weightedmean_tokens"}, "weightedmean"),
        ({"labels": 1, "sbert_ce_default_activation_function": "Softplus"}, "Softplus"),
    ],
)
def test_what_is_not_known_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    folder = encoders.write(tmp_path / "m", **changes)
    if "num_hidden_layers" in changes:
        encoders.save(folder / "model.safetensors", encoders.weights(encoders.config(), 0, 0))
    with pytest.raises(ModelBroken, match=said):
        load(folder)
