"""Model folders' tokenizers against transformers' reading of the same folders."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from mlx_serving.content.tokenizer import Tokenizer
from mlx_serving.errors import InvalidRequest, ModelBroken

SAMPLES = [
    "",
    "The fox",
    " the  the\n",
    "a<|im_end|>b <tool_call>",
    "<|new|> x <|other|>",
    "漢字 🦊",
]
ADDED = {
    "content": "<|new|>",
    "lstrip": False,
    "normalized": False,
    "rstrip": False,
    "single_word": False,
    "special": True,
}
TEXT = "The quick brown fox jumps over the lazy dog. "
CONFIGS: dict[str, dict[str, Any]] = {
    "bare": {},
    "named": {
        "bos_token": "<s>",
        "eos_token": ADDED | {"__type": "AddedToken", "content": "</s>"},
        "image_token": "<|im_start|>",
    },
    "bos": {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True},
    "bos_eos": {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "add_bos_token": True,
        "add_eos_token": True,
    },
    "no_bos": {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False},
    "bos_unnamed": {"add_bos_token": True},
    "new_tokens": {"added_tokens_decoder": {"999": ADDED}, "eos_token": "<|other|>"},
    "extra": {"additional_special_tokens": ["<|new|>", "<|im_end|>"]},
}


@pytest.mark.parametrize("processed", [False, True])
@pytest.mark.parametrize("family", ["byte_level", "llama", "gemma"])
@pytest.mark.parametrize("name", CONFIGS)
def test_folders_are_read_as_transformers_reads_them(
    backends: dict[str, hf.Tokenizer],
    write_folder: Callable[..., Path],
    name: str,
    family: str,
    processed: bool,
) -> None:
    backend = hf.Tokenizer.from_str(backends[family].to_str())
    if processed:
        bos = backend.token_to_id("<|endoftext|>")
        assert bos is not None
        backend.post_processor = TemplateProcessing(
            single="<|endoftext|> $A", pair=None, special_tokens=[("<|endoftext|>", bos)]
        )
    folder = write_folder(backend, CONFIGS[name])
    ours, theirs = Tokenizer.load(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    if not processed:  # else the file's post-processor decides
        theirs.add_bos_token = CONFIGS[name].get("add_bos_token", False)
        theirs.add_eos_token = CONFIGS[name].get("add_eos_token", False)
    for text in SAMPLES:
        for special in (False, True):
            expected = theirs.encode(text, add_special_tokens=special)
            assert ours.encode(text, add_special_tokens=special) == expected
            assert ours.decode(expected) == theirs.decode(expected, skip_special_tokens=True)
    assert ours.special_tokens == theirs.special_tokens_map
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.vocab_size == len(theirs)


def test_named_tokens_of_an_older_folder(
    backends: dict[str, hf.Tokenizer], write_folder: Callable[..., Path]
) -> None:
    folder = write_folder(
        backends["byte_level"],
        {"bos_token": "<|im_start|>"},
        special_tokens_map={"bos_token": "<s>"},
    )
    assert Tokenizer.load(folder).special_tokens == {"bos_token": "<s>"}
    listed = {"bos_token": "<|im_start|>", "added_tokens_decoder": {}}
    folder = write_folder(backends["byte_level"], listed, special_tokens_map={"bos_token": "<s>"})
    assert Tokenizer.load(folder).special_tokens == {"bos_token": "<|im_start|>"}


def test_truncation_and_padding_of_the_file_do_not_apply(
    backends: dict[str, hf.Tokenizer], write_folder: Callable[..., Path]
) -> None:
    backend = hf.Tokenizer.from_str(backends["byte_level"].to_str())
    backend.enable_truncation(2)
    backend.enable_padding(length=4)
    tokenizer = Tokenizer.load(write_folder(backend))
    assert len(tokenizer.encode("x", add_special_tokens=False)) == 1
    assert len(tokenizer.encode("漢字かな", add_special_tokens=False)) == 3


@settings(max_examples=50, deadline=None)
@given(text=st.text("<|im_start>ab ", max_size=12).map(lambda t: f"{t}<|im_start|>{t}"))
def test_control_tokens_can_be_read_as_plain_text(
    tokenizers: dict[str, Tokenizer], text: str
) -> None:
    tokenizer = tokenizers["byte_level"]
    control = tokenizer.token_id("<|im_start|>")
    assert control in tokenizer.encode(text, add_special_tokens=False)
    ids = tokenizer.encode(text, add_special_tokens=False, parse_special_tokens=False)
    assert not tokenizer.special_ids & set(ids)
    assert tokenizer.decode(ids) == text


def test_encoding_lets_other_threads_run(tokenizers: dict[str, Tokenizer]) -> None:
    done, ticks = threading.Event(), 0

    def tick() -> None:
        nonlocal ticks
        while not done.wait(0.0005):
            ticks += 1

    interval, ticker = sys.getswitchinterval(), threading.Thread(target=tick)
    sys.setswitchinterval(60)  # threads run when another lets go, and only then
    try:
        ticker.start()
        before = ticks
        tokenizers["byte_level"].encode(TEXT * 2_000, add_special_tokens=False)
        assert ticks > before
    finally:
        done.set()
        sys.setswitchinterval(interval)
        ticker.join()


def test_ids_and_texts_that_do_not_exist(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte_level"]
    (a,) = tokenizer.encode("a", add_special_tokens=False)
    assert tokenizer.decode([a, -1, tokenizer.vocab_size, 2**40]) == "a"
    assert tokenizer.token(-1) is None
    assert tokenizer.token_id("no such token") is None
    with pytest.raises(InvalidRequest, match="Unicode"):
        tokenizer.encode("a\ud800", add_special_tokens=False)


def test_broken_folders(
    backends: dict[str, hf.Tokenizer], write_folder: Callable[..., Path]
) -> None:
    folder = write_folder(backends["byte_level"])
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ModelBroken, match="JSON object"):
        Tokenizer.load(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelBroken, match="cannot be read"):
        Tokenizer.load(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelBroken, match="cannot be read"):
        Tokenizer.load(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelBroken, match=r"no tokenizer\.json"):
        Tokenizer.load(folder)
