"""The real embedder: all-MiniLM-L6-v2 against numpy and against its published vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import encoders
from mlx_serving import Engine

pytestmark = pytest.mark.model

EXAMPLE = "This is an example sentence"
PUBLISHED = [0.0676569, 0.0634959, 0.0487131, 0.0793050, 0.0374480]
"""How sentence-transformers' vector of EXAMPLE begins."""
TEXTS = [
    EXAMPLE,
    "Each sentence is converted",
    "Paris is the capital of France.",
    "The capital of France",
    "Bananas are yellow; Ünïcödé, 中文 and 🙂 are text too.",
    "word " * 200,
]


@pytest.fixture(scope="module")
def minilm_dir() -> Path:
    from mlx_serving.catalog.ensure import ensure
    from mlx_serving.config import Config

    return ensure("all-minilm-l6-v2", Config()).path


@pytest.mark.parametrize("kernels", ["auto", pytest.param("off", marks=pytest.mark.slow)])
async def test_vectors_are_the_published_ones(minilm_dir: Path, kernels: str) -> None:
    oracle = encoders.Oracle(minilm_dir)
    async with Engine(str(minilm_dir), kernels=kernels) as engine:
        found = await engine.embed(TEXTS)
        ids = [await engine.tokenize(text) for text in TEXTS]
        alone = [(await engine.embed(text)).vectors[0] for text in TEXTS[:3]]
        ranking = await engine.rerank(TEXTS[3], TEXTS, top_n=2)
    assert found.usage.prompt_tokens == sum(map(len, ids))
    assert list(found.vectors[0])[:5] == pytest.approx(PUBLISHED, abs=2e-6)
    for token_ids, vector in zip(ids, found.vectors, strict=True):
        expected = oracle.states(token_ids).mean(0)
        expected /= np.linalg.norm(expected)
        assert np.asarray(vector) @ expected == pytest.approx(1, abs=1e-6)
        assert np.asarray(vector) == pytest.approx(expected, abs=2e-6)
    for one, other in zip(alone, found.vectors, strict=False):
        assert one == other or kernels == "off"
    assert [r.index for r in ranking.results] == [3, 2] and ranking.results[0].score > 0.9999
