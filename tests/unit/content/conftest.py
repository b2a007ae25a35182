"""Small tokenizers of each family, made here: no model folder is needed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers as hf
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from mlx_serving.content.tokenizer import Tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog. What is the capital of France? Paris!",
    "def main(argv: list[str]) -> int:\n    return 0\n\n\tprint('hello, world')",
    "Dès Noël où un zéphyr haï me vêt de glaçons würmiens, je dîne d'exquis rôtis.",
    "漢字かな交じり文とカタカナ。 안녕하세요 세계. שלום עולם مرحبا بالعالم",
]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"]


def byte_level() -> hf.Tokenizer:
    """GPT-2's kind: SmolLM2, Llama 3, Qwen."""
    tokenizer = hf.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=alphabet, special_tokens=SPECIALS, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens(["<tool_call>", "a b → c"])
    return tokenizer


def sentencepiece(*, strip: bool) -> hf.Tokenizer:
    """Llama 2's kind (`strip`) and Gemma's: `▁` for a space, bytes where the vocabulary ends."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = sorted({*"".join(TEXTS[:3]).replace(" ", "▁")} | {"▁"})
    vocab = {token: i for i, token in enumerate(["<unk>", *bytes_, *letters, "▁t", "▁th", "▁the"])}
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e")]
    tokenizer = hf.Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    replace = normalizers.Replace(" ", "▁")
    tail: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if strip:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
        tail.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = replace
    tokenizer.decoder = decoders.Sequence(tail)
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


def metaspace() -> hf.Tokenizer:
    tokenizer = sentencepiece(strip=False)
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def word_piece() -> hf.Tokenizer:
    """BERT's kind, whose decoder joins words by context."""
    words = ["[UNK]", "the", "quick", "fox", "##es", "##y", "do", "##n", "'", "t", ".", ","]
    tokenizer = hf.Tokenizer(
        models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


BACKENDS: dict[str, Callable[[], hf.Tokenizer]] = {
    "byte_level": byte_level,
    "llama": lambda: sentencepiece(strip=True),
    "gemma": lambda: sentencepiece(strip=False),
    "metaspace": metaspace,
    "word_piece": word_piece,
}


@pytest.fixture(scope="session")
def backends() -> dict[str, hf.Tokenizer]:
    return {name: make() for name, make in BACKENDS.items()}


@pytest.fixture(scope="session")
def tokenizers(backends: dict[str, hf.Tokenizer]) -> dict[str, Tokenizer]:
    return {name: Tokenizer(backend) for name, backend in backends.items()}


@pytest.fixture
def write_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes a model folder's tokenizer files: (backend, config, **more JSON files)."""

    def write(backend: hf.Tokenizer, config: dict[str, Any] | None = None, **files: Any) -> Path:
        backend.save(str(tmp_path / "tokenizer.json"))
        for name, value in {"tokenizer_config": config or {}, **files}.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(value))
        return tmp_path

    return write
