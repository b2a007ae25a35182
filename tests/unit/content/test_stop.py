"""The stop matcher against a search of every prefix of the text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_serving.content.stop import StopMatcher, StopStrings, compile_stops


def oracle(stops: list[str], text: str) -> tuple[str, str | None]:
    """(text before the stop string, the stop string): the first to be complete, then the longest."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end - len(stop)], stop
    return text, None


def could_begin(stops: list[str], text: str) -> int:
    """Length of the longest end of the text that begins a stop string."""
    return max(
        n for n in range(len(text) + 1) if any(s.startswith(text[len(text) - n :]) for s in stops)
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[str], list[str]]:
    letters = draw(st.sampled_from(["ab", "abc", "a\n<|", "é漢😀a"]))
    stops = draw(st.lists(st.text(letters, min_size=1, max_size=6), min_size=1, max_size=4))
    return stops, draw(st.lists(st.text(letters, max_size=5), max_size=20))


@settings(max_examples=400, deadline=None)
@given(case=cases())
def test_any_chunking_gives_what_the_whole_text_gives(case: tuple[list[str], list[str]]) -> None:
    stops, chunks = case
    matcher = StopMatcher(StopStrings(stops))
    out, read = "", ""
    for chunk in chunks:
        out, read = out + matcher.push(chunk), read + chunk
        if matcher.stop is not None:
            break
        # Nothing is held back but what may yet begin a stop string.
        assert len(read) - len(out) == could_begin(stops, read)
    if matcher.stop is None:
        out += matcher.finish()
    assert (out, matcher.stop) == oracle(stops, "".join(chunks))


@pytest.mark.parametrize(
    ("stops", "chunks", "text", "stop"),
    [
        (["END"], ["abc E", "N", "D more"], "abc ", "END"),
        (["END"], ["EN", "EN", "D"], "EN", "END"),
        (["aab"], ["aa", "aab"], "aa", "aab"),
        (["abcd", "c"], ["ab", "cd"], "ab", "c"),
        (["bc", "abc"], ["xab", "c"], "x", "abc"),
        (["]", "^-\\"], ["a^-", "\\"], "a", "^-\\"),
        (["👩‍👧"], ["👩", "\u200d", "👧"], "", "👩‍👧"),
    ],
)
def test_cases(stops: list[str], chunks: list[str], text: str, stop: str) -> None:
    matcher = StopMatcher(StopStrings(stops))
    out = ""
    for chunk in chunks:
        out += matcher.push(chunk)
        if matcher.stop:
            break
    assert (out, matcher.stop) == (text, stop)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["a", ""])


def test_streams_share_the_automaton() -> None:
    assert compile_stops(("a", "b")) is compile_stops(("a", "b"))
