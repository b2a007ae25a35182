"""Decoders' vectors: the hidden state that mlx-lm computes, whoever decodes beside it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import encoders
from mlx_serving.errors import ModelBroken
from mlx_serving.runtime.backend import loader
from mlx_serving.runtime.backend.arch import head_on_last, make_store
from mlx_serving.runtime.backend.pooling import Pooling, RowPooler
from mlx_serving.runtime.backend.runner import MLXRunner
from mlx_serving.runtime.backend.sampler import Sampler
from mlx_serving.runtime.core.plan import Limits
from mlx_serving.runtime.core.scheduler import Scheduler
from mlx_serving.runtime.core.sequence import Sequence
from mlx_serving.types import SamplingParams
from mlx_serving.worker.wire import ModelOptions
from model import zoo

STEP = 8
LENGTHS = (1, 3, 8, 9, 16, 17, 29)
KINDS = ("llama", "qwen3", "gemma3_text", "deepseek_v3", "falcon_h1", "lfm2")
ONE = SamplingParams(max_tokens=1)


def texts() -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(1, zoo.VOCAB) for _ in range(n)] for n in LENGTHS]


def hidden(model: Any, text: list[int]) -> np.ndarray:
    """`[tokens, hidden]`, of mlx-lm's own forward pass."""
    from mlx_lm.models.cache import make_prompt_cache

    return np.array(model.model(mx.array([text]), cache=make_prompt_cache(model))[0])


def make_runner(model: Any, mode: Any) -> MLXRunner:
    store = make_store(model, model.model_type, 4, bucket=16, exact_batch=False)
    return MLXRunner(
        model,
        store,
        Sampler(zoo.VOCAB, (), 4),
        max_rows=4,
        backbone=head_on_last(model),
        pooler=RowPooler(Pooling(mode)),
    )


def pooled(runner: MLXRunner, jobs: list[list[int]], decoding: int = 0) -> list[np.ndarray]:
    """Each text's vector, while so many other sequences decode."""
    sched = Scheduler(Limits(4, STEP, 64, 10_000, 16))
    for i in range(decoding):
        prompt = [7 + i] * (3 + i)
        params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
        sched.add(Sequence(seq_id=100 + i, tokens=prompt, prompt_len=len(prompt), sampling=params))
    for i, text in enumerate(jobs):
        tokens, length = list(text), len(text)
        sched.add(Sequence(seq_id=i, tokens=tokens, prompt_len=length, sampling=ONE, pooled=True))
    vectors: dict[int, np.ndarray] = {}
    while len(vectors) < len(jobs):
        launched = [runner.launch(p) for p in (sched.schedule(0.0), sched.schedule(0.0)) if p]
        for step in launched:
            for one in sched.apply(step.wait()):
                if one.vector is not None:
                    vectors[one.seq_id] = np.frombuffer(one.vector, "<f4")
    runner.reset()
    return [vectors[i] for i in range(len(jobs))]


@pytest.mark.parametrize("name", KINDS)
def test_vectors_are_mlx_lms_and_nobody_elses(name: str) -> None:
    model = zoo.build(name)
    expected = [hidden(model, text) for text in texts()]
    runner = make_runner(model, "last")
    alone = [pooled(runner, [text])[0] for text in texts()]
    for states, vector in zip(expected, alone, strict=True):
        assert vector == pytest.approx(states[-1], abs=2e-4)
    together = pooled(runner, texts(), decoding=2)
    for one, other in zip(alone, together, strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("name", ["llama", "falcon_h1"])
def test_a_mean_over_chunks_is_the_mean(name: str) -> None:
    model = zoo.build(name)
    expected = [hidden(model, text).mean(0) for text in texts()]
    runner = make_runner(model, "mean")
    for mean, vector in zip(expected, pooled(runner, texts(), decoding=1), strict=True):
        assert vector == pytest.approx(mean, abs=2e-4)


def write(folder: Path, prefix: str = "model.", **files: Any) -> Path:
    """A decoder's folder as sentence-transformers keeps it."""
    folder.mkdir()
    model = zoo.build("qwen3")
    arrays = dict(tree_flatten(model.model.parameters()))
    mx.save_safetensors(
        str(folder / "model.safetensors"), {prefix + name: a for name, a in arrays.items()}
    )
    pooling = {"pooling_mode_lasttoken": True}
    modules = [{"path": p, "type": t} for p, t in (("", "Transformer"), ("1_Pooling", "Pooling"))]
    config = {**zoo.config("qwen3"), "eos_token_id": 3, **files.pop("config", {})}
    given = {"config.json": config, "modules.json": modules, "1_Pooling/config.json": pooling}
    for name, value in (given | files).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(value))
    (folder / "tokenizer.json").write_text(encoders.tokenizer_json("bert"))
    return folder


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_a_folder_without_a_head_is_loaded(tmp_path: Path, prefix: str) -> None:
    folder = write(tmp_path / "m", prefix)
    loaded = loader.load("m", folder, ModelOptions(kernels="off"), lambda *_: None)
    info = loaded.info
    assert (info.kind, info.embedding_size, info.append_eos) == ("embedder", 64, True)
    text = texts()[2]
    expected = hidden(zoo.build("qwen3"), text)[-1]
    assert pooled(loaded.runner, [text])[0] == pytest.approx(expected, abs=2e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"config": {"is_causal": False}}, "both directions"),
        ({"1_Pooling/config.json": {"pooling_mode_cls_token": True}}, "'cls' of a decoder"),
    ],
)
def test_a_decoder_whose_vectors_would_be_wrong_is_refused(
    tmp_path: Path, files: Any, said: str
) -> None:
    with pytest.raises(ModelBroken, match=said):
        loader.load("m", write(tmp_path / "m", **files), ModelOptions(), lambda *_: None)
