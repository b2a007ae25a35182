"""ModernBERT and nomic-bert against slow ones in numpy, through the loader and the runner."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import rotary_encoders
from mlx_serving.errors import ModelBroken
from mlx_serving.runtime.backend import loader
from mlx_serving.runtime.backend.model import LoadedModel
from mlx_serving.runtime.core.plan import PrefillChunk, RowStart, StepPlan
from mlx_serving.types import SamplingParams
from mlx_serving.worker.wire import ModelOptions

NATIVE = mx.default_device() == mx.Device(mx.cpu)
KERNELS = ("auto", "off") if NATIVE else ("auto",)
FAMILIES = ("modernbert", "nomic_bert")
TOLERANCE = 2e-5
LENGTHS = (1, 2, 5, 9, 9, 10, 23, 40)
"""Up to the context; a window of 4 to either side sees all of the first four."""


def load(folder: Path, kernels: str = "auto", **options: Any) -> LoadedModel:
    settings = ModelOptions(kernels=kernels, **options)
    return loader.load("m", folder, settings, lambda phase, detail: None)


def texts() -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(2, 64) for _ in range(n)] for n in LENGTHS]


def run(
    model: LoadedModel, jobs: Sequence[Sequence[int]], second_at: int | None = None
) -> list[np.ndarray]:
    """Each text's vector, all in one step."""
    params = SamplingParams()
    starts = tuple(
        RowStart(i, i, tuple(t), len(t), params, second_at=second_at) for i, t in enumerate(jobs)
    )
    chunks = tuple(
        PrefillChunk(i, i, tuple(t), 0, samples=True, pooled=True) for i, t in enumerate(jobs)
    )
    result = model.runner.launch(StepPlan(0, starts=starts, prefill=chunks)).wait()
    vectors = {one.seq_id: one.vector for one in result.sampled}
    return [np.frombuffer(vectors[i] or b"", "<f4") for i in range(len(jobs))]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_are_the_oracles(tmp_path: Path, family: str, kernels: str) -> None:
    folder = rotary_encoders.write(tmp_path / family, family)
    oracle, model = rotary_encoders.Oracle(folder), load(folder, kernels)
    assert (model.info.kind, model.info.embedding_size) == ("embedder", 32)
    assert model.info.context_length == model.info.max_input_tokens == 40
    together = run(model, texts())
    for text, vector in zip(texts(), together, strict=True):
        assert vector == pytest.approx(oracle.states(text).mean(0), abs=TOLERANCE)
        assert run(model, [text])[0] == pytest.approx(vector, abs=TOLERANCE)


def test_the_second_of_a_pair_has_its_own_type(tmp_path: Path) -> None:
    folder = rotary_encoders.write(tmp_path / "m", "nomic_bert")
    text, oracle = texts()[5], rotary_encoders.Oracle(folder)
    expected = oracle.states(text, [0] * 4 + [1] * (len(text) - 4)).mean(0)
    assert run(load(folder), [text], 4)[0] == pytest.approx(expected, abs=TOLERANCE)
    assert expected != pytest.approx(oracle.states(text).mean(0), abs=0.01)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("modernbert", {"classifier_pooling": "cls"}),
        ("modernbert", {"classifier_pooling": "mean"}),
        ("nomic_bert", {}),
    ],
)
def test_a_cross_encoders_scores_are_the_oracles(
    tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    folder = rotary_encoders.write(tmp_path / "m", family, labels=1, **changes)
    oracle, model = rotary_encoders.Oracle(folder), load(folder)
    assert model.info.kind == "reranker"
    for text, vector in zip(texts(), run(model, texts()), strict=True):
        score = 1 / (1 + math.exp(-oracle.score(text)))
        assert vector == pytest.approx([score], abs=TOLERANCE)


def test_later_configs_say_the_same(tmp_path: Path) -> None:
    folder = rotary_encoders.write(tmp_path / "m", "modernbert")
    expected = run(load(folder), texts())
    settings = json.loads((folder / "config.json").read_text())
    for name in ("global_attn_every_n_layers", "global_rope_theta", "local_rope_theta"):
        del settings[name]
    kinds = ["full_attention", "sliding_attention"]
    settings["layer_types"] = [kinds[i % 3 > 0] for i in range(4)]
    bases = zip(kinds, (160000.0, 10000.0), strict=True)
    settings["rope_parameters"] = {
        kind: {"rope_type": "default", "rope_theta": base} for kind, base in bases
    }
    (folder / "config.json").write_text(json.dumps(settings))
    for one, other in zip(run(load(folder), texts()), expected, strict=True):
        assert np.array_equal(one, other)


def test_scaled_rotations_are_used_as_far_as_they_are_not_scaled(tmp_path: Path) -> None:
    scaled = {"rotary_scaling_factor": 2.0, "max_trained_positions": 16}
    folder = rotary_encoders.write(tmp_path / "m", "nomic_bert", **scaled)
    assert load(folder).info.max_input_tokens == 16


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("modernbert", {"hidden_activation": "swish"}, "'swish'"),
        ("modernbert", {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "'yarn'"),
        ("modernbert", {"num_hidden_layers": "many"}, "num_hidden_layers"),
        ("modernbert", {"labels": 3}, "3 classes"),
        ("nomic_bert", {"activation_function": "gelu"}, "'gelu'"),
        ("nomic_bert", {"rotary_emb_fraction": 0.5}, "part of each head"),
        ("nomic_bert", {"moe_every_n_layers": 2}, "mixture of experts"),
        ("nomic_bert", {"prenorm": True}, "prenorm"),
        ("nomic_bert", {"labels": 3}, "3 classes"),
    ],
)
def test_what_is_not_known_is_refused_by_name(
    tmp_path: Path, family: str, changes: dict[str, Any], said: str
) -> None:
    if "num_hidden_layers" in changes:
        folder = rotary_encoders.write(tmp_path / "m", family)
        settings = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(settings))
    else:
        folder = rotary_encoders.write(tmp_path / "m", family, **changes)
    with pytest.raises(ModelBroken, match=said):
        load(folder)
