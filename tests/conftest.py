"""Models for every suite: a scripted one (no arithmetic, real processes), and the default model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import byte_vocabulary

EOS = 256
IM_START = 257
IM_END = 258
VOCAB = 259

ScriptedModel = Callable[..., Path]


def _byte_tokenizer() -> str:
    """Token id = byte value; three control tokens. So tests can say tokens as text and back."""
    alphabet = byte_vocabulary.letters()
    vocab = {alphabet[b]: b for b in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True) for t in ("<|end|>", "<|im_start|>", "<|im_end|>")]
    )
    return tokenizer.to_str()


@pytest.fixture
def scripted(tmp_path: Path) -> ScriptedModel:
    """A factory of model folders: `scripted(text="Hi.")`, `scripted(mode="echo", vocab=…)`."""

    def make(name: str = "scripted", text: str | None = None, **script: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        if text is not None:
            script |= {"mode": "text", "token_ids": list(text.encode())}
        config = {
            "model_type": "scripted",
            "vocab_size": VOCAB,
            "max_position_embeddings": 512,
            "eos_token_id": EOS,
            "script": script,
        }
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "tokenizer.json").write_text(_byte_tokenizer())
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
        return folder

    return make


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """SmolLM2-135M as an MLX folder: $MLX_SERVING_TEST_MODEL, or the default model, pulled once."""
    if given := os.environ.get("MLX_SERVING_TEST_MODEL"):
        return Path(given)
    from mlx_serving.catalog.ensure import ensure
    from mlx_serving.config import DEFAULT_MODEL, Config

    return ensure(DEFAULT_MODEL, Config()).path
