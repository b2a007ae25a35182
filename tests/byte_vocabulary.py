"""A vocabulary whose token ids are byte values, so that tests can write output as bytes."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

END = "<|end|>"


def letters() -> dict[int, str]:
    """The 256-letter alphabet of byte-level tokenizers, by byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}


def write(folder: Path, *, eos: int) -> Path:
    """tokenizer.json. `eos` is the byte that the end of sequence takes, or 256 for one of its own."""
    vocab = {letter: byte for byte, letter in letters().items() if byte != eos}
    tokenizer = Tokenizer(models.BPE(vocab={**vocab, END: eos}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    path = folder / "tokenizer.json"
    path.write_text(tokenizer.to_str())
    return path
