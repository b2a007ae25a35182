"""Rows that follow a grammar: tokens reach their matchers in order, before the next mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mlx_serving.errors import InvalidRequest
from mlx_serving.runtime.backend.grammar_rows import GrammarRows
from mlx_serving.runtime.backend.pending import Forward
from mlx_serving.runtime.core.plan import Forced, RowStart
from mlx_serving.types import SamplingParams


@dataclass
class Grammar:
    """Its own only matcher, which notes what it is given."""

    seen: list[int] = field(default_factory=list)
    run: list[int] = field(default_factory=list)
    """What has to come next."""
    error: InvalidRequest | None = None

    def matcher(self, output: Sequence[int]) -> Grammar:
        self.seen += output
        return self

    def accept(self, token_id: int) -> None:
        self.seen.append(token_id)

    def mask(self) -> bytes | None:
        if self.error is not None:
            raise self.error
        return bytes(self.seen)

    def forced(self, most: int) -> list[int]:
        run, self.run = self.run, []
        self.seen += run
        return run


def following(grammar: Grammar, *, foresight: bool = False) -> GrammarRows:
    """Row 1 has two tokens of a prompt, and one that it got before."""
    rows = GrammarRows(foresight)
    rows.start(RowStart(0, 6, (1,), 1, SamplingParams()))
    rows.start(RowStart(1, 7, (1, 2, 3), 2, SamplingParams(), grammar))
    return rows


def forward(position: int, drawn: int) -> Forward:
    return Forward(None, [0, 1], [6, 7], [1, position], host_tokens=[99, drawn])


def test_a_drawn_token_is_seen_before_the_next_mask() -> None:
    rows = following(Grammar())
    first, second = forward(3, 4), forward(4, 5)
    assert rows.masks(first) == {1: bytes([3])}
    rows.drew(first)
    assert rows.masks(second) == {1: bytes([3, 4])}
    rows.drew(second)
    assert rows.masks(forward(5, 6)) == {1: bytes([3, 4, 5])}
    assert rows.foreseen() == []


def test_what_is_forced_is_told_with_what_is_in_flight_and_not_seen_twice() -> None:
    grammar = Grammar()
    rows = following(grammar, foresight=True)
    first, second = forward(3, 4), forward(4, 5)
    rows.masks(first)
    rows.drew(first)
    grammar.run = [5, 8, 9]
    assert rows.masks(second) == {1: bytes([3, 4])}
    assert rows.foreseen() == [Forced(7, 3, (4, 5, 8, 9))]
    assert rows.foreseen() == []
    rows.drew(second)
    assert rows.masks(forward(7, 10)) == {1: bytes([3, 4, 5, 8, 9])}


def test_who_cannot_go_on_has_no_mask_but_an_error() -> None:
    error = InvalidRequest("it is more than its bounds allow", param="p")
    rows = following(Grammar(error=error))
    first = forward(3, 4)
    assert rows.masks(first) == {}
    assert first.errors == {1: error}


def test_it_follows_its_row() -> None:
    rows = following(Grammar())
    assert rows.among([0, 1]) and not rows.among([0, None])
    rows.move(1, 0)
    assert rows.among([0]) and not rows.among([1])
    rows.free(0)
    assert not rows.among([0, 1])
    rows.move(0, 1)
    assert rows.masks(forward(3, 4)) == {}
