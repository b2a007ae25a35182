"""Text that is still coming, read as if it were all there.

A parser is a generator: it asks a `Reader` for what it expects and is suspended where the text so
far cannot tell. What it reads depends on the whole text alone, never on where a push ended, since
every primitive waits until its answer is certain.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")
Steps = Generator[None, None, T]
"""Yields when it needs more text; returns T."""
Emit = Callable[[str], object]

SPACE = re.compile(r"\s*")


class Malformed(Exception):
    """The text is not what its markup announced; the message is the reason."""


class Stops:
    """A set of texts to look for. None may be a prefix of another."""

    def __init__(self, texts: tuple[str, ...]) -> None:
        assert all(texts), "an empty text is everywhere"
        assert not any(a != b and b.startswith(a) for a in texts for b in texts), texts
        self._texts = texts
        self.longest = max(map(len, texts), default=0)
        self._search = re.compile("|".join(map(re.escape, texts)) or r"(?!)").search
        self._firsts = re.compile(
            "[" + "".join(re.escape(t[0]) for t in texts) + "]" if texts else r"(?!)"
        )

    def find(self, text: str, at: int, *, ended: bool) -> tuple[int, str]:
        """Up to where `text` certainly holds none of them, and the one that begins there or ""."""
        found = self._search(text, at)
        safe = len(text) if ended else self._partial(text, at)
        if found is None or safe < found.start():
            return safe, ""
        return found.start(), found.group()

    def _partial(self, text: str, at: int) -> int:
        """Where the end of `text` may be the beginning of one of them."""
        start = max(at, len(text) - self.longest + 1)
        while (first := self._firsts.search(text, start)) is not None:
            tail = text[first.start() :]
            if any(len(tail) < len(t) and t.startswith(tail) for t in self._texts):
                return first.start()
            start = first.end()
        return len(text)


@functools.lru_cache(maxsize=256)
def stops(*texts: str) -> Stops:
    return Stops(texts)


class Reader:
    """The text and how far it has been read.

    A mark keeps the text from there on, for a reader that may have to give it back as it was.
    """

    __slots__ = ("_at", "_ended", "_mark", "_text")

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._mark: int | None = None
        self._ended = False

    def feed(self, text: str, *, ended: bool = False) -> None:
        kept = self._at if self._mark is None else self._mark
        self._text = self._text[kept:] + text
        self._at -= kept
        if self._mark is not None:
            self._mark = 0
        self._ended = ended

    def mark(self, back: int = 0) -> None:
        """Remember this place, or the one `back` characters before, which were just read."""
        self._mark = self._at - back
        assert self._mark >= 0, "that text is gone"

    def unmark(self) -> None:
        self._mark = None

    def raw(self) -> str:
        """The text read since the mark."""
        assert self._mark is not None, "nothing was marked"
        return self._text[self._mark : self._at]

    def peek(self) -> Steps[str]:
        """The next character; "" at the end."""
        while self._at >= len(self._text) and not self._ended:
            yield
        return self._text[self._at : self._at + 1]

    def accept(self, literal: str) -> Steps[bool]:
        """Read `literal` if it comes next."""
        while True:
            ahead = self._text[self._at : self._at + len(literal)]
            if ahead == literal:
                self._at += len(literal)
                return True
            if self._ended or not literal.startswith(ahead):
                return False
            yield

    def expect(self, literal: str) -> Steps[None]:
        if not (yield from self.accept(literal)):
            raise Malformed(f"{literal!r} is missing")

    def close(self, literal: str) -> Steps[None]:
        """Read `literal` if it comes next, or what there is of it where the text ends within it."""
        if not (yield from self.accept(literal)) and literal.startswith(self._text[self._at :]):
            self._at = len(self._text)

    def run(self, characters: re.Pattern[str], limit: int | None = None) -> Steps[str]:
        """The longest text of a repeated class of characters (`[a-z]*`). Raises Malformed over
        `limit` characters."""
        parts: list[str] = []
        size = 0
        while True:
            end = len(self._text) if limit is None else self._at + limit + 1 - size
            found = characters.match(self._text, self._at, min(end, len(self._text)))
            assert found is not None, "the class may be repeated zero times"
            parts.append(found.group())
            size += len(parts[-1])
            self._at = found.end()
            if limit is not None and size > limit:
                raise Malformed(f"{limit} characters and no end")
            if self._at < len(self._text) or self._ended:
                return "".join(parts)
            yield

    def take(self, characters: re.Pattern[str]) -> str:
        """What is already there of a repeated class of characters."""
        found = characters.match(self._text, self._at)
        assert found is not None, "the class may be repeated zero times"
        self._at = found.end()
        return found.group()

    def space(self) -> Steps[None]:
        yield from self.run(SPACE)

    def until(self, ends: Stops, emit: Emit) -> Steps[str]:
        """Give out the text before one of `ends` as it comes, read that one too and return it;
        "" at the end of the text."""
        while True:
            cut, end = ends.find(self._text, self._at, ended=self._ended)
            if cut > self._at:
                emit(self._text[self._at : cut])
            self._at = cut + len(end)
            if end or self._ended:
                return end
            yield

    def capture(self, ends: Stops, limit: int) -> Steps[tuple[str, str]]:
        """The text before one of `ends`, and that one. Raises Malformed, nothing read, when it does
        not come within `limit` characters."""
        while True:
            cut, end = ends.find(self._text, self._at, ended=self._ended)
            if cut - self._at > limit or (self._ended and not end):
                raise Malformed("the end of a name is missing")
            if end:
                text = self._text[self._at : cut]
                self._at = cut + len(end)
                return text, end
            yield
