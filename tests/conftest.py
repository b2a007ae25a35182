"""Models for every suite: a scripted one (no arithmetic, real processes), and the default model."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import byte_vocabulary

EOS = 256
IM_START = 257
IM_END = 258
VOCAB = 259
CONTROLS = ("<|end|>", "<|im_start|>", "<|im_end|>")

ScriptedModel = Callable[..., Path]


def _byte_tokenizer(*specials: str) -> str:
    """Token id = byte value; three control tokens and `specials` after them. So tests can say tokens
    as text and back."""
    alphabet = byte_vocabulary.letters()
    vocab = {alphabet[b]: b for b in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in (*CONTROLS, *specials)])
    return tokenizer.to_str()


def spell(text: str, specials: tuple[str, ...] = ()) -> list[int]:
    """Token ids of a text: its bytes, and control tokens where it names them."""
    names = (*CONTROLS, *specials)
    parts = re.split("(" + "|".join(map(re.escape, names)) + ")", text)
    return [
        token_id
        for part in parts
        for token_id in ([EOS + names.index(part)] if part in names else part.encode())
    ]


def _write_scripted(
    parent: Path,
    name: str = "scripted",
    text: str | None = None,
    *,
    context: int = 512,
    specials: tuple[str, ...] = (),
    chat_template: str | None = None,
    **script: Any,
) -> Path:
    folder = parent / name
    folder.mkdir()
    if text is not None:
        script |= {"mode": "text", "token_ids": spell(text, specials)}
    config = {
        "model_type": "scripted",
        "vocab_size": VOCAB + len(specials),
        "max_position_embeddings": context,
        "eos_token_id": EOS,
        "script": script,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(_byte_tokenizer(*specials))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template)
    return folder


@pytest.fixture
def scripted(tmp_path: Path) -> ScriptedModel:
    """A factory of model folders: `scripted(text="Hi.")`, `scripted(mode="echo", vocab=…)`.

    `specials` are control tokens with ids from VOCAB on; in `text` they become those tokens.
    """
    return partial(_write_scripted, tmp_path)


@pytest.fixture(scope="module")
def scripted_once(tmp_path_factory: pytest.TempPathFactory) -> ScriptedModel:
    """`scripted` for what a module's tests share."""
    return partial(_write_scripted, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """SmolLM2-135M as an MLX folder: $MLX_SERVING_TEST_MODEL, or the default model, pulled once."""
    if given := os.environ.get("MLX_SERVING_TEST_MODEL"):
        return Path(given)
    from mlx_serving.catalog.ensure import ensure
    from mlx_serving.config import DEFAULT_MODEL, Config

    return ensure(DEFAULT_MODEL, Config()).path
