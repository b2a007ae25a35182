"""The incremental decoder against the tokenizers library's decoding of the whole."""

from __future__ import annotations

import pytest
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders

from mlx_serving.content.detokenize import open_detokenizer
from mlx_serving.content.tokenizer import Tokenizer

TABLED = ["byte_level", "llama", "gemma", "metaspace"]
TEXT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.text("ab the ▁é漢😀\n "),
    st.sampled_from(
        ["👩‍👩‍👧‍👦 family", "🇫🇷🏳️‍🌈", "שלום עולם", "مرحبا", "e\u0301", " the", "  the", "", "\x00"]
    ),
)


def stream(tokenizer: Tokenizer, ids: list[int], **options: bool) -> list[str]:
    decoder = open_detokenizer(tokenizer, **options)
    return [*map(decoder.push, ids), decoder.finish()]


def special_tokens(tokenizer: Tokenizer) -> frozenset[str]:
    return frozenset(filter(None, map(tokenizer.token, tokenizer.special_ids)))


@pytest.mark.parametrize("family", TABLED)
@settings(max_examples=150, deadline=None)
@given(text=TEXT)
def test_increments_join_to_the_whole_decode_of_a_text(
    tokenizers: dict[str, Tokenizer], family: str, text: str
) -> None:
    tokenizer = tokenizers[family]
    ids = tokenizer.encode(text, add_special_tokens=False)
    parts = stream(tokenizer, ids)
    assert "".join(parts) == tokenizer.decode(ids)
    assert text.count("\ufffd") == "".join(parts).count("\ufffd")


@settings(max_examples=300, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_byte_level_increments_equal_the_library_for_any_ids(
    tokenizers: dict[str, Tokenizer], data: st.DataObject, skip: bool
) -> None:
    tokenizer = tokenizers["byte_level"]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=40))
    parts = stream(tokenizer, ids, markup=frozenset() if skip else special_tokens(tokenizer))
    assert "".join(parts) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("family", ["llama", "gemma", "metaspace"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_sentencepiece_increments_equal_the_library_where_bytes_are_valid(
    tokenizers: dict[str, Tokenizer], family: str, data: st.DataObject
) -> None:
    tokenizer = tokenizers[family]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    whole = tokenizer.decode(ids)
    joined = "".join(stream(tokenizer, ids))
    if "\ufffd" not in whole:
        assert joined == whole
    else:  # the library marks each byte of a bad run, good characters in it included
        assert "\ufffd" in joined


@settings(max_examples=100, deadline=None)
@given(raw=st.binary(max_size=40))
def test_byte_fallback_reads_bytes_as_utf8_does(
    tokenizers: dict[str, Tokenizer], raw: bytes
) -> None:
    tokenizer = tokenizers["gemma"]
    ids = [tokenizer.token_id(f"<0x{byte:02X}>") for byte in raw]
    assert "".join(stream(tokenizer, [i for i in ids if i is not None])) == raw.decode(
        errors="replace"
    )


@pytest.mark.parametrize("family", ["byte_level", "gemma"])
def test_a_character_is_held_back_until_it_is_whole(
    tokenizers: dict[str, Tokenizer], family: str
) -> None:
    tokenizer = tokenizers[family]
    ids = tokenizer.encode("🦊", add_special_tokens=False)
    assert len(ids) > 1
    assert stream(tokenizer, ids) == [*[""] * (len(ids) - 1), "🦊", ""]


def test_an_unfinished_character_shows_at_the_end_only(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte_level"]
    ids = tokenizer.encode("🦊", add_special_tokens=False)[:-1]
    assert stream(tokenizer, ids) == [*[""] * len(ids), "\ufffd"]


def test_special_tokens_are_skipped_or_kept(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte_level"]
    ids = tokenizer.encode("a<|im_end|><tool_call>b", add_special_tokens=False)
    assert stream(tokenizer, ids) == ["a", "", "<tool_call>", "b", ""]
    kept = stream(tokenizer, ids, markup=special_tokens(tokenizer))
    assert kept == ["a", "<|im_end|>", "<tool_call>", "b", ""]


def test_a_leading_space_belongs_to_a_continued_text(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["llama"]
    ids = tokenizer.encode("the the", add_special_tokens=False)
    assert "".join(stream(tokenizer, ids)) == "the the"
    assert "".join(stream(tokenizer, ids, continues=True)) == " the the"


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 11), max_size=60))
def test_decoders_without_a_table_are_read_through_a_window(
    tokenizers: dict[str, Tokenizer], ids: list[int]
) -> None:
    tokenizer = tokenizers["word_piece"]
    joined = "".join(stream(tokenizer, ids))
    assert joined.replace(" ", "") == tokenizer.decode(ids).replace(" ", "")


def test_a_window_keeps_the_spaces_between_words(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["word_piece"]
    ids = tokenizer.encode("the quick foxes", add_special_tokens=False)
    assert stream(tokenizer, ids) == ["the", " quick", " fox", "es", ""]


def test_token_bytes_are_the_tokens_own(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte_level"]
    ids = tokenizer.encode(" naïve 🦊<|im_end|>", add_special_tokens=False)
    spelt = b"".join(tokenizer.token_text(i)[1] for i in ids)
    assert spelt == " naïve 🦊<|im_end|>".encode()
    assert tokenizer.token_text(tokenizer.vocab_size + 7) == ("", b"")
    byte = tokenizers["llama"].token_id("<0xF0>")
    assert byte is not None
    assert tokenizers["llama"].token_text(byte) == ("\ufffd", b"\xf0")


def test_a_window_stays_short_while_there_is_no_text(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["word_piece"]
    quick = tokenizer.encode("quick", add_special_tokens=False)
    assert "".join(stream(tokenizer, [999] * 100 + quick)) == "quick"
    assert tokenizer.token_text(quick[0]) == ("quick", b"quick")


DECODERS: dict[str, decoders.Decoder | None] = {
    "none": None,
    "pattern": decoders.Sequence([decoders.Replace(Regex("e+"), "E"), decoders.Fuse()]),
    "strip_end": decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
    "strip_two": decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 2, 0),
        ]
    ),
    "replace_two": decoders.Sequence(
        [decoders.Replace("▁", "_"), decoders.Replace("_", " "), decoders.Fuse()]
    ),
    "metaspace_never": decoders.Metaspace(prepend_scheme="never"),
}


@pytest.mark.parametrize("name", ["byte_level", "llama", "gemma", "word_piece"])
def test_markup_is_spoken_and_other_special_tokens_are_not(
    backends: dict[str, hf.Tokenizer], name: str
) -> None:
    backend = hf.Tokenizer.from_str(backends[name].to_str())
    backend.add_special_tokens(["<|call|>", "<|other|>"])
    tokenizer = Tokenizer(backend)
    ids = [i for t in ("<|other|>", "<|call|>") if (i := tokenizer.token_id(t)) is not None]
    text = tokenizer.encode("the", add_special_tokens=False)
    decoder = open_detokenizer(tokenizer, markup=frozenset({"<|call|>", "not a token"}))
    said = "".join([*map(decoder.push, [*text, *ids, *text]), decoder.finish()])
    assert "<|call|>" in said and "<|other|>" not in said
    assert said.count("the") == 2


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("text", ["the fox", "   the  eel", "x", "the <0xZZ> eel"])
def test_other_decoders(backends: dict[str, hf.Tokenizer], name: str, text: str) -> None:
    backend = hf.Tokenizer.from_str(backends["gemma"].to_str())
    backend.decoder = DECODERS[name]
    tokenizer = Tokenizer(backend)
    ids = tokenizer.encode(text, add_special_tokens=False)
    joined, whole = "".join(stream(tokenizer, ids)), tokenizer.decode(ids)
    # Only the windowed reading may keep a last space that the decoder strips.
    assert joined.rstrip() == whole.rstrip()
