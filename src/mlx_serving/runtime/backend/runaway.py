"""Ends what runs away in constrained JSON where its schema lets it go on: digits, strings, white space.

One third, greedily written, never ends; nor does a string that repeats itself. White space is bounded
in the grammar. Digits and strings are counted in tokens, from the tokens alone, so that a resumed
sequence counts the same; over the bound, the mask leaves what ends them, if the schema allows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_serving.worker.wire import ModelOptions


@dataclass(frozen=True, slots=True)
class Bounds:
    """In a row, between two tokens of JSON or within one; 0: no bound, but no white space at all."""

    digit_tokens: int = 40
    string_tokens: int = 16_384
    white_space: int = 20

    @classmethod
    def of(cls, options: ModelOptions) -> Bounds:
        return cls(options.json_digit_tokens, options.json_string_tokens, options.json_white_space)

    @property
    def white_space_pattern(self) -> str:
        """What may stand between two tokens of JSON; "": nothing."""
        return rf"[ \n\t]{{1,{self.white_space}}}" if self.white_space else ""


_NEWLINES = ("\u010a", "\n", "<0x0A>")
"""A line's end, as byte-level and SentencePiece vocabularies write it."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens that tell digits, strings and free text apart."""

    bounds: Bounds
    digits: frozenset[int] = frozenset()
    quotes: frozenset[int] = frozenset()
    """Those with a quotation mark that no backslash precedes within the token."""
    letter: int = 0
    """Mask of `a`, which may come within a string; a digit means something else there."""
    quote: int = 0
    """Mask of the quotation mark alone."""
    newline: int = 0
    """Mask of a line's end, which may come in free text but not within a string."""
    digit: int = 0
    """Mask of all digits."""

    @classmethod
    def read(cls, model: Mapping[str, Any], bounds: Bounds) -> Vocabulary:
        """From the `model` of a tokenizer.json; nothing is ended where tokens are missing."""
        vocab = model["vocab"]
        known: dict[str, int] = (
            vocab if isinstance(vocab, dict) else {text: i for i, (text, _) in enumerate(vocab)}
        )
        if "a" not in known:
            return cls(bounds)

        def bit(*texts: str) -> int:
            return next((1 << known[text] for text in texts if text in known), 0)

        digits = frozenset(i for text, i in known.items() if text.isascii() and text.isdigit())
        return cls(
            bounds,
            digits,
            frozenset(i for text, i in known.items() if '"' in text.replace('\\"', "")),
            bit("a"),
            bit('"'),
            bit(*_NEWLINES),
            sum(1 << i for i in digits),
        )


@dataclass(slots=True)
class Runs:
    """How long one sequence's digits and string have gone on."""

    vocabulary: Vocabulary
    _digits: int = field(default=0, init=False)
    _unquoted: int = field(default=0, init=False)

    def accept(self, token_id: int) -> None:
        v = self.vocabulary
        self._digits = self._digits + 1 if token_id in v.digits else 0
        self._unquoted = 0 if token_id in v.quotes else self._unquoted + 1

    def bounded(self, mask: bytes) -> bytes:
        """The mask, without what would go on for too long."""
        v, bounds = self.vocabulary, self.vocabulary.bounds
        if v.digits and 0 < bounds.digit_tokens <= self._digits:
            return _without_digits(v, mask)
        if v.newline and v.quote and 0 < bounds.string_tokens <= self._unquoted:
            return _end_of_string(v, mask)
        return mask


def _without_digits(v: Vocabulary, mask: bytes) -> bytes:
    """As it was inside a string (a letter may come), or where nothing but a digit may come."""
    allowed = int.from_bytes(mask, "little")
    rest = allowed & ~v.digit
    return mask if allowed & v.letter or not rest else rest.to_bytes(len(mask), "little")


def _end_of_string(v: Vocabulary, mask: bytes) -> bytes:
    """The quotation mark alone, inside a string that may end here."""
    allowed = int.from_bytes(mask, "little")
    inside = allowed & v.letter and not allowed & v.newline
    return v.quote.to_bytes(len(mask), "little") if inside and allowed & v.quote else mask
