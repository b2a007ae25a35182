"""The clients of embedding and rerank APIs against a real server with real (tiny) encoders."""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import ollama
import openai
import pytest

import encoders
from contract.served import serving

TEXTS = [f"w{i} w{2 * i} w3" for i in range(20)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoders.write(tmp_path_factory.mktemp("encoders") / "embedder")


@pytest.fixture(scope="module")
def url(folder: Path, scripted_once: Any) -> Iterator[str]:
    models = [
        scripted_once("chat", text="Hello!", context=4096),
        folder,
        encoders.write(folder.parent / "ranker", labels=1),
    ]
    with serving(models) as url:
        yield url


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=120) as client:
        yield client


def ids_of(words: str) -> list[int]:
    return [2, *(4 + int(word[1:]) for word in words.split()), 3]


def expected(folder: Path, texts: list[str], size: int = 32) -> np.ndarray:
    oracle = encoders.Oracle(folder)
    pooled = np.stack([oracle.states(ids_of(text)).mean(0)[:size] for text in texts])
    return pooled / np.linalg.norm(pooled, axis=1, keepdims=True)


def test_openais_client(url: str, folder: Path) -> None:
    """It asks for base64 unless told otherwise, and decodes it."""
    sdk = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0, timeout=120)
    found = sdk.embeddings.create(model="embedder", input=TEXTS)
    vectors = np.array([item.embedding for item in found.data])
    assert vectors == pytest.approx(expected(folder, TEXTS), abs=1e-5)
    assert [item.index for item in found.data] == list(range(20)) and found.model == "embedder"
    assert found.usage.prompt_tokens == found.usage.total_tokens == 100
    for given in (TEXTS[1], ids_of(TEXTS[1]), [ids_of(TEXTS[1])]):
        for form in ("float", "base64"):
            one = sdk.embeddings.create(model="embedder", input=given, encoding_format=form)  # type: ignore[arg-type]
            vector = one.data[0].embedding
            if isinstance(vector, str):
                vector = list(struct.unpack("<32f", base64.b64decode(vector)))
            assert vector == pytest.approx(list(vectors[1]), abs=1e-5)
    short = sdk.embeddings.create(model="embedder", input=TEXTS[0], dimensions=4, user="me")
    assert short.data[0].embedding == pytest.approx(
        list(expected(folder, TEXTS[:1], 4)[0]), abs=1e-5
    )
    pooled = sdk.embeddings.create(model="chat", input="a decoder gives vectors, too")
    assert len(pooled.data[0].embedding) == 8
    with pytest.raises(openai.BadRequestError, match="takes at most 32") as caught:
        sdk.embeddings.create(model="embedder", input=["w1", "w1 " * 40])
    assert (caught.value.param, caught.value.code) == ("input[1]", "context_length_exceeded")
    with pytest.raises(openai.BadRequestError, match="use /v1/embeddings") as caught:
        sdk.chat.completions.create(model="embedder", messages=[{"role": "user", "content": "w1"}])
    assert caught.value.param == "model"
    chat = sdk.chat.completions.create(model="chat", messages=[{"role": "user", "content": "x"}])
    assert chat.choices[0].message.content == "Hello!"


def test_ollamas_client(url: str, folder: Path) -> None:
    sdk = ollama.Client(host=url, timeout=120)
    found = sdk.embed(model="embedder", input=TEXTS, keep_alive="5m", options={"num_ctx": 64})
    assert np.array(found.embeddings) == pytest.approx(expected(folder, TEXTS), abs=1e-5)
    assert found.prompt_eval_count == 100 and (found.total_duration or 0) > 0
    cut = sdk.embed(model="embedder:latest", input="w5 " * 40, dimensions=4)
    assert np.array(cut.embeddings) == pytest.approx(expected(folder, ["w5 " * 30], 4), abs=1e-5)
    with pytest.raises(ollama.ResponseError, match="takes at most 32"):
        sdk.embed(model="embedder", input="w5 " * 40, truncate=False)
    with pytest.raises(ollama.ResponseError, match="not served here"):
        sdk.embed(model="gone", input="w5")
    raw = np.array(sdk.embeddings(model="embedder", prompt=TEXTS[0]).embedding)
    assert np.linalg.norm(raw) > 1.5
    assert raw / np.linalg.norm(raw) == pytest.approx(expected(folder, TEXTS[:1])[0], abs=1e-5)
    assert sdk.show("embedder").capabilities == ["embedding"]


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank"])
def test_rerank_clients_bodies(http: httpx.Client, folder: Path, path: str) -> None:
    """As Jina's, Cohere's and vLLM's clients write them."""
    body: dict[str, Any] = {"query": "w1 w2", "documents": TEXTS, "top_n": 3}
    answer = http.post(path, json={"model": "ranker", **body}).raise_for_status().json()
    scores = [result["relevance_score"] for result in answer["results"]]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True)
    oracle = encoders.Oracle(folder.parent / "ranker")
    for result in answer["results"]:
        first, second = ids_of(body["query"]), ids_of(TEXTS[result["index"]])[1:]
        logit = oracle.score([*first, *second], [0] * len(first) + [1] * len(second))
        assert result["relevance_score"] == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-5)
        assert result["document"] == {"text": TEXTS[result["index"]]}
    cosine = http.post(path, json={"model": "embedder", **body}).raise_for_status().json()
    vectors = expected(folder, [body["query"], *TEXTS])
    best = cosine["results"][0]
    assert best["relevance_score"] == pytest.approx(max(vectors[1:] @ vectors[0]), abs=1e-5)
    refused = http.post(path, json={"model": "chat", **body})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "model")
    too_long = http.post(path, json={"model": "ranker", "query": "w1", "documents": ["w2 " * 40]})
    assert too_long.json()["error"]["param"] == "documents[0]"
