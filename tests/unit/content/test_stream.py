"""Tokens to a choice's text: counts, stop strings, log-probabilities."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_serving.content.detokenize import open_detokenizer
from mlx_serving.content.stop import compile_stops
from mlx_serving.content.stream import ChoiceText
from mlx_serving.content.tokenizer import Tokenizer
from mlx_serving.types import TokenLogprob


@pytest.fixture
def tokenizer(tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    return tokenizers["byte_level"]


def choice(
    tokenizer: Tokenizer, *stops: str, include: bool = False, min_tokens: int = 0
) -> ChoiceText:
    return ChoiceText(
        tokenizer,
        open_detokenizer(tokenizer),
        compile_stops(stops) if stops else None,
        include_stop_str=include,
        min_tokens=min_tokens,
    )


def spell(tokenizer: Tokenizer, text: str) -> list[int]:
    """One token a byte."""
    return [i for b in text for i in tokenizer.encode(b, add_special_tokens=False)]


def test_tokens_become_text(tokenizer: Tokenizer) -> None:
    text = choice(tokenizer)
    ids = tokenizer.encode("The 🦊 jumps", add_special_tokens=False)
    deltas = [text.push([i]) for i in ids]
    assert "".join(d.text for d in deltas) + text.finish() == "The 🦊 jumps"
    assert [d.token_ids for d in deltas] == [[i] for i in ids]
    assert text.push(ids).text == "The 🦊 jumps"
    assert text.push([]).text == ""


def test_tokens_count_up_to_the_one_that_completes_a_stop_string(tokenizer: Tokenizer) -> None:
    text = choice(tokenizer, "END")
    ids = spell(tokenizer, "oh ENDless")
    delta = text.push(ids)
    assert (delta.text, delta.stop, delta.token_ids) == ("oh ", "END", ids[:6])
    after = text.push(ids)
    assert (after.text, after.token_ids, after.stop, text.stop) == ("", [], None, "END")
    assert text.finish() == ""


def test_the_stop_string_can_be_included(tokenizer: Tokenizer) -> None:
    text = choice(tokenizer, "END", include=True)
    assert [text.push([i]).text for i in spell(tokenizer, "aEND")] == ["a", "", "", "END"]


def test_what_only_began_a_stop_string_is_given_out_at_the_end(tokenizer: Tokenizer) -> None:
    text = choice(tokenizer, "END")
    assert text.push(spell(tokenizer, "the EN")).text == "the "
    assert text.push(tokenizer.encode("🦊", add_special_tokens=False)[:1]).text == ""
    assert text.finish() == "EN\ufffd"


def test_no_stop_string_is_looked_for_before_min_tokens(tokenizer: Tokenizer) -> None:
    text = choice(tokenizer, "x", min_tokens=2)
    ids = spell(tokenizer, "xxxx")
    delta = text.push(ids)
    assert (delta.text, delta.token_ids, delta.stop) == ("xx", ids[:3], "x")


@pytest.mark.parametrize("stops", [(), ("never",)])
def test_a_stop_token_counts_without_text(tokenizer: Tokenizer, stops: tuple[str, ...]) -> None:
    text = choice(tokenizer, *stops)
    ids = spell(tokenizer, "ab.")
    delta = text.push(ids, stop_token_id=ids[-1])
    assert (delta.text, delta.token_ids, delta.stop) == ("ab", ids, None)


def test_logprobs_have_the_tokens_text_and_bytes(tokenizer: Tokenizer) -> None:
    text = choice(tokenizer, "b")
    ids = [*tokenizer.encode("🦊", add_special_tokens=False), *spell(tokenizer, "abc")]
    entries = [TokenLogprob(-0.5, (i, ids[0]), (-0.5, -1.0)) for i in ids]
    delta = text.push(ids, entries)
    assert delta.text == "🦊a"
    assert delta.logprobs is not None
    assert b"".join(entry.raw for entry in delta.logprobs) == "🦊ab".encode()
    first, last = delta.logprobs[0], delta.logprobs[-1]
    assert first.token == "\ufffd"
    assert (last.token, last.raw, last.logprob) == ("b", b"b", -0.5)
    assert last.top == (("b", b"b", -0.5), ("\ufffd", first.raw, -1.0))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_grouping_of_tokens_gives_the_same(
    tokenizers: dict[str, Tokenizer], data: st.DataObject
) -> None:
    tokenizer = tokenizers["byte_level"]
    text = data.draw(st.text("ab\n é🦊", max_size=30))
    stops = data.draw(st.lists(st.text("ab\n é🦊", min_size=1, max_size=4), max_size=3))
    ids = tokenizer.encode(text, add_special_tokens=False)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(ids)), max_size=6)) | {0, len(ids)})
    groups = [ids[a:b] for a, b in itertools.pairwise(cuts)]

    def run(groups: list[list[int]]) -> tuple[str, int, str | None]:
        each = choice(tokenizer, *stops)
        deltas = [each.push(group) for group in groups]
        joined = "".join(d.text for d in deltas) + each.finish()
        return joined, sum(len(d.token_ids) for d in deltas), each.stop

    one_by_one = run([[i] for i in ids])
    assert run(groups) == one_by_one
    if not any(stop in text for stop in stops):
        assert one_by_one == (text, len(ids), None)
    else:
        assert text.startswith(one_by_one[0])
        assert one_by_one[2] in stops
