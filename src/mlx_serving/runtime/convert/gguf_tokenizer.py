"""tokenizer.json and its companions from a GGUF file's `tokenizer.ggml.*` metadata.

Two families: `gpt2`, byte-level BPE whose splitting rule is named by `tokenizer.ggml.pre`, and
`llama`, SentencePiece BPE whose merges follow from the pieces' scores.
Source of the rules: llama.cpp src/llama-vocab.cpp, and the models' published tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from mlx_serving.errors import ModelBroken
from mlx_serving.runtime.convert.gguf_file import GGUFFile, corrupt

_NUMBERED = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_END_OF_TURN = frozenset(
    ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>")
)  # fmt: skip
"""Control tokens that end a turn or a text in every model that has them."""


class Kind(IntEnum):
    """`tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class BuiltTokenizer:
    tokenizer: Tokenizer
    config: dict[str, Any]
    """tokenizer_config.json"""
    generation_config: dict[str, Any]
    special_ids: dict[str, int | list[int]]
    """bos, eos and pad for config.json."""


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    tokens: list[str]
    kinds: list[int]

    def of(self, *kinds: Kind) -> list[str]:
        return [token for token, kind in zip(self.tokens, self.kinds, strict=True) if kind in kinds]

    def ids(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens)}


def build(gguf: GGUFFile) -> BuiltTokenizer:
    """Raises ModelBroken: corrupt_file, or unsupported_tokenizer naming the model or rule."""
    family = gguf.get("tokenizer.ggml.model", str)
    if family not in _FAMILIES:
        raise _unsupported(gguf, f"tokenizer model {family!r}; supported: {', '.join(_FAMILIES)}")
    vocabulary = _vocabulary(gguf)
    special = _special_ids(gguf, vocabulary)
    tokenizer = _FAMILIES[family](gguf, vocabulary)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in vocabulary.of(Kind.CONTROL)]
    )
    # A run of spaces may be stored as such or as they are after normalising; a prefix
    # would be put before the token's own text too, so there only the raw form can match.
    normalized = family == "llama" and not _has_space_prefix(gguf)
    tokenizer.add_tokens(
        [
            AddedToken(token, special=False, normalized=normalized and "▁" in token)
            for token in vocabulary.of(Kind.USER_DEFINED)
            if token
        ]
    )
    add_bos = gguf.get(
        "tokenizer.ggml.add_bos_token", bool, family == "llama" or _rule(gguf) in _BOS_RULES
    )
    add_eos = gguf.get("tokenizer.ggml.add_eos_token", bool, False)
    _add_template(tokenizer, vocabulary, special, add_bos=add_bos, add_eos=add_eos)
    eos = _end_ids(gguf, vocabulary, special)
    ids = {key: value for key, value in special.items() if key != "unknown"}
    special_ids: dict[str, int | list[int]] = {
        f"{key}_token_id": value for key, value in ids.items()
    }
    if eos:
        special_ids["eos_token_id"] = eos[0] if len(eos) == 1 else eos
    return BuiltTokenizer(
        tokenizer=tokenizer,
        config=_tokenizer_config(gguf, vocabulary, special, add_bos=add_bos, add_eos=add_eos),
        generation_config=dict(special_ids),
        special_ids=special_ids,
    )


def _unsupported(gguf: GGUFFile, what: str) -> ModelBroken:
    return ModelBroken(f"{gguf.path.name}: cannot convert {what}", code="unsupported_tokenizer")


def _strings(gguf: GGUFFile, key: str) -> list[str]:
    value = gguf.get(key, list)
    if not all(isinstance(item, str) for item in value):
        raise corrupt(gguf.path, f"{key!r} is not a list of text")
    return value


def _numbers(gguf: GGUFFile, key: str, length: int) -> list[Any]:
    value = gguf.get(key, np.ndarray)
    if len(value) != length:
        raise corrupt(gguf.path, f"{key!r} has {len(value)} elements for {length} tokens")
    return list(value.tolist())


def _vocabulary(gguf: GGUFFile) -> _Vocabulary:
    tokens = _strings(gguf, "tokenizer.ggml.tokens")
    if "tokenizer.ggml.token_type" not in gguf.metadata:
        return _Vocabulary(tokens, [Kind.NORMAL] * len(tokens))
    return _Vocabulary(tokens, _numbers(gguf, "tokenizer.ggml.token_type", len(tokens)))


def _special_ids(gguf: GGUFFile, vocabulary: _Vocabulary) -> dict[str, int]:
    keys = {
        "bos": "bos_token_id",
        "eos": "eos_token_id",
        "pad": "padding_token_id",
        "unknown": "unknown_token_id",
    }
    ids: dict[str, int] = {}
    for name, key in keys.items():
        if f"tokenizer.ggml.{key}" in gguf.metadata:
            token_id = gguf.get(f"tokenizer.ggml.{key}", int)
            if not 0 <= token_id < len(vocabulary.tokens):
                raise corrupt(gguf.path, f"{key} {token_id} is outside the vocabulary")
            ids[name] = token_id
    if "pad" not in ids and "eos" in ids:
        ids["pad"] = ids["eos"]
    return ids


def _end_ids(gguf: GGUFFile, vocabulary: _Vocabulary, special: dict[str, int]) -> list[int]:
    """The declared end first, then what else ends a turn."""
    ids = [special["eos"]] if "eos" in special else []
    keys = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
    ids += [gguf.get(key, int) for key in keys if key in gguf.metadata]
    known = enumerate(zip(vocabulary.tokens, vocabulary.kinds, strict=True))
    ids += [i for i, (token, kind) in known if kind == Kind.CONTROL and token in _END_OF_TURN]
    return list(dict.fromkeys(ids))


def _tokenizer_config(
    gguf: GGUFFile,
    vocabulary: _Vocabulary,
    special: dict[str, int],
    *,
    add_bos: bool,
    add_eos: bool,
) -> dict[str, Any]:
    name = gguf.get("general.architecture", str)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": gguf.get(f"{name}.context_length", int),
        "clean_up_tokenization_spaces": False,
        "add_bos_token": add_bos,
        "add_eos_token": add_eos,
    }
    for key, field in (
        ("bos", "bos_token"),
        ("eos", "eos_token"),
        ("pad", "pad_token"),
        ("unknown", "unk_token"),
    ):
        if key in special:
            config[field] = vocabulary.tokens[special[key]]
    if template := gguf.get("tokenizer.chat_template", str, ""):
        config["chat_template"] = template
    return config


def _add_template(
    tokenizer: Tokenizer,
    vocabulary: _Vocabulary,
    special: dict[str, int],
    *,
    add_bos: bool,
    add_eos: bool,
) -> None:
    used = [
        key for key, wanted in (("bos", add_bos), ("eos", add_eos)) if wanted and key in special
    ]
    if not used:
        return
    names = {key: vocabulary.tokens[special[key]] for key in used}
    before = f"{names['bos']} " if "bos" in names else ""
    after = f" {names['eos']}" if "eos" in names else ""
    ids = sorted({(names[key], special[key]) for key in used})
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{before}$A{after}", pair=f"{before}$A{after} {before}$B{after}", special_tokens=ids
    )


# -- gpt2: byte-level BPE ------------------------------------------------------------------


def _byte_level(*first: Any) -> Any:
    """`first` cuts the text, then GPT-2's own rule does."""
    return pre_tokenizers.Sequence(
        [*first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )


def _split_by(pattern: str) -> Any:
    """`pattern` replaces GPT-2's rule."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _digits_first() -> Any:
    return _byte_level(pre_tokenizers.Digits(individual_digits=True))


def _punctuation_first() -> Any:
    """llama.cpp's `default`: punctuation, words, then digits in threes."""
    return _byte_level(
        pre_tokenizers.Split(Regex(r"[\p{P}\$\+<=>\^~\|]+"), "isolated"),
        pre_tokenizers.Split(Regex(r"\p{N}+"), "isolated"),
        pre_tokenizers.Split(Regex(r"[0-9][0-9][0-9]"), "isolated"),
    )


_RULES: dict[str, Callable[[], Any]] = {
    **dict.fromkeys(("default",), _punctuation_first),
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt", "jais", "dbrx-gpt2"), _byte_level),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), _digits_first),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "smaug-bpe", "falcon3", "pixtral"),
        lambda: _split_by(_NUMBERED % "{1,3}"),
    ),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), lambda: _split_by(_NUMBERED % "")),
    "tekken": lambda: _split_by(_TEKKEN),
}  # fmt: skip
_BOS_RULES = frozenset(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken"))
_WHOLE_WORDS = _BOS_RULES
"""Rules under which a word that is one token is not built up by merges."""


def _rule(gguf: GGUFFile) -> str:
    return gguf.get("tokenizer.ggml.pre", str, "default")


def _byte_bpe(gguf: GGUFFile, vocabulary: _Vocabulary) -> Tokenizer:
    rule = _rule(gguf)
    if rule not in _RULES:
        raise _unsupported(gguf, f"pre-tokenizer {rule!r}; supported: {', '.join(sorted(_RULES))}")
    ids = vocabulary.ids()
    merges = [_merge(gguf, ids, text) for text in _strings(gguf, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=rule in _WHOLE_WORDS))
    if rule in ("qwen2", "deepseek-r1-qwen"):
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _RULES[rule]()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _merge(gguf: GGUFFile, ids: dict[str, int], text: str) -> tuple[str, str]:
    left, _, right = text.partition(" ")
    if left not in ids or right not in ids or left + right not in ids:
        raise corrupt(gguf.path, f"merge {text!r} is not made of its tokens")
    return left, right


# -- llama: SentencePiece BPE --------------------------------------------------------------


def _sentencepiece(gguf: GGUFFile, vocabulary: _Vocabulary) -> Tokenizer:
    scores = _numbers(gguf, "tokenizer.ggml.scores", len(vocabulary.tokens))
    unknown = vocabulary.of(Kind.UNKNOWN)
    if not unknown and "tokenizer.ggml.unknown_token_id" in gguf.metadata:
        unknown = [vocabulary.tokens[gguf.get("tokenizer.ggml.unknown_token_id", int)]]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary.ids(),
            merges=_merges_by_score(vocabulary, scores),
            unk_token=unknown[0] if unknown else None,
            fuse_unk=True,
            byte_fallback=bool(vocabulary.of(Kind.BYTE)),
        )
    )
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    mark_spaces: Any = normalizers.Replace(" ", "▁")
    if _has_space_prefix(gguf):
        mark_spaces = normalizers.Sequence([normalizers.Prepend("▁"), mark_spaces])
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = mark_spaces
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _has_space_prefix(gguf: GGUFFile) -> bool:
    return gguf.get("tokenizer.ggml.add_space_prefix", bool, True)


def _merges_by_score(vocabulary: _Vocabulary, scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece merges the neighbours whose union scores best, so a merge's rank is the rank of
    what it makes. Only normal pieces are made, and made of."""
    normal = {
        token: score
        for token, kind, score in zip(vocabulary.tokens, vocabulary.kinds, scores, strict=True)
        if kind == Kind.NORMAL
    }
    found = [
        (score, token[:cut], token[cut:])
        for token, score in normal.items()
        for cut in range(1, len(token))
        if token[:cut] in normal and token[cut:] in normal
    ]
    found.sort(key=lambda merge: -merge[0])
    return [(left, right) for _, left, right in found]


_FAMILIES = {"gpt2": _byte_bpe, "llama": _sentencepiece}
