"""Tokenizers rebuilt from GGUF metadata, against SentencePiece and against known splits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor
from sentencepiece import sentencepiece_model_pb2 as pb
from tokenizers import Tokenizer

from mlx_serving.errors import ModelBroken
from mlx_serving.runtime.convert.gguf_file import GGUFFile
from mlx_serving.runtime.convert.gguf_tokenizer import build

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "theft",
    "often",
    "thousand",
    "aa",
    "aaa",
    "aaaa",
    "row",
    "x**2",
]
TEXTS = [
    "the theft",
    " often the  thousand",
    "aaaaa aaa",
    "héllo\x00 \U0001f642",
    "a\n\n\nb",
    "   the    fox",
    "",
]


def metadata(**values: Any) -> GGUFFile:
    fields = {"general.architecture": "llama", "llama.context_length": 64}
    return GGUFFile(
        Path("m.gguf"), fields | {f"tokenizer.ggml.{k}": v for k, v in values.items()}, {}
    )


def sentencepiece_pieces() -> list[tuple[str, float, int]]:
    """(piece, score, kind): controls, bytes, a few characters and every prefix of some words."""
    pieces = [
        ("<unk>", 0.0, 2),
        ("<s>", 0.0, 3),
        ("</s>", 0.0, 3),
        ("\n\n", 0.0, 4),
        ("▁▁", 0.0, 4),
    ]
    pieces += [(f"<0x{b:02X}>", 0.0, 6) for b in range(256)]
    merged = sorted(
        {("▁" + w)[:n] for w in WORDS if w for n in range(2, len(w) + 2)} | {"aa", "aaa", "he"}
    )
    merged = [m for m in merged if "\n" not in m and "▁▁" not in m]
    pieces += [(m, -float(i), 1) for i, m in enumerate(sorted(merged, key=len))]
    chars = sorted(set("".join(WORDS)) - {"\n"} | {"▁", "b", "l"})
    return pieces + [(c, -1000.0 - i, 1) for i, c in enumerate(chars)]


def sentencepiece_oracle(
    pieces: list[tuple[str, float, int]], prefix: bool
) -> SentencePieceProcessor:
    model = pb.ModelProto()
    for text, score, kind in pieces:
        model.pieces.add(piece=text, score=score, type=kind)
    model.trainer_spec.model_type = 2
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = prefix
    model.normalizer_spec.remove_extra_whitespaces = False
    return SentencePieceProcessor(model_proto=model.SerializeToString())


@pytest.mark.parametrize("prefix", [False, True])
def test_sentencepiece_models_encode_as_sentencepiece_does(prefix: bool) -> None:
    pieces = [p for p in sentencepiece_pieces() if not (prefix and p[2] == 4)]
    oracle = sentencepiece_oracle(pieces, prefix)
    gguf = metadata(
        model="llama",
        tokens=[p.replace("▁", " ") if kind == 4 else p for p, _, kind in pieces],
        scores=np.array([s for _, s, _ in pieces], np.float32),
        token_type=np.array([k for _, _, k in pieces], np.int32),
        bos_token_id=1,
        eos_token_id=2,
        add_space_prefix=prefix,
    )
    tokenizer = build(gguf).tokenizer
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == oracle.encode(text), text
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("the").ids[0] == 1


def byte_tokenizer(pre: str, **values: Any) -> Tokenizer:
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = [*sorted(ByteLevel.alphabet()), "<|a|>", "<|im_end|>", "<tool>"]
    kinds = [1] * 256 + [3, 3, 4]
    gguf = metadata(
        model="gpt2", pre=pre, tokens=tokens, token_type=np.array(kinds), merges=[], **({"bos_token_id": 256, "eos_token_id": 256} | values)
    )  # fmt: skip
    return build(gguf)


def splits(pre: str, text: str) -> list[str]:
    pieces = byte_tokenizer(pre).tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return [text[a:b] for _, (a, b) in pieces]


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("smollm", "in 2024 it's", ["in", " ", "2", "0", "2", "4", " it", "'s"]),
        ("gpt-2", "in 2024 it's", ["in", " 2024", " it", "'s"]),
        ("llama-bpe", "in 20245 IT'S\n\nok", ["in", " ", "202", "45", " IT", "'S", "\n\n", "ok"]),
        ("qwen2", "in 2024 it's", ["in", " ", "2", "0", "2", "4", " it", "'s"]),
        ("tekken", "helloWorld 12", ["hello", "World", " ", "1", "2"]),
        ("default", "a+b 12345", ["a", "+", "b", " ", "123", "45"]),
    ],
)
def test_each_rule_splits_as_its_model_does(pre: str, text: str, expected: list[str]) -> None:
    assert splits(pre, text) == expected


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "qwen2", "tekken", "default"])
def test_byte_level_round_trips(pre: str) -> None:
    tokenizer = byte_tokenizer(pre).tokenizer
    for text in ("héllo \U0001f642\n\n  x = 123", "\x00\x7f ok", " "):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_control_and_user_defined_tokens_are_whole() -> None:
    built = byte_tokenizer("gpt-2")
    ids = built.tokenizer.encode("x<|a|>y<tool>z").ids
    assert ids.count(256) == 1
    assert ids.count(258) == 1
    assert built.tokenizer.decode(ids) == "xy<tool>z"
    assert built.generation_config["eos_token_id"] == [256, 257]


def test_bos_and_eos_are_added_as_the_file_says() -> None:
    encode = byte_tokenizer(
        "gpt-2", add_bos_token=True, add_eos_token=True, eos_token_id=257
    ).tokenizer.encode
    ids = encode("x").ids
    assert (ids[0], ids[-1], len(ids)) == (256, 257, 3)
    assert byte_tokenizer("llama-bpe").tokenizer.encode("x").ids[0] == 256


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"eos_token_id": 9999}, "eos_token_id"),
        ({"merges": ["a zz"]}, "merge"),
        ({"token_type": np.array([1])}, "token_type"),
    ],
)
def test_broken_metadata_is_named(values: dict[str, Any], named: str) -> None:
    tokens = ["a", "b", "ab"]
    fields = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": np.array([1, 1, 1]),
        "merges": ["a b"],
    }
    with pytest.raises(ModelBroken, match=named):
        build(metadata(**(fields | values)))


def test_an_unknown_tokenizer_model_is_named() -> None:
    with pytest.raises(ModelBroken, match="rwkv") as caught:
        build(metadata(model="rwkv", tokens=["a"]))
    assert caught.value.code == "unsupported_tokenizer"
