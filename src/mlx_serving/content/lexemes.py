"""A GBNF grammar as a Lark grammar that allows the same texts.

GBNF knows characters only. Lark cuts a text into lexemes first, each as long as it can get, and
masks are fast where lexemes are long. So what repeats and every rule that does not lead back to itself
is tried as a lexeme, and taken apart again where that would change the language: where after a
lexeme something may follow that a longer lexeme could swallow. At the end there are single
characters, which swallow nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Parts
from dataclasses import dataclass
from itertools import groupby
from operator import or_
from typing import assert_never

from mlx_serving.content.gbnf import (
    NOTHING,
    BadGrammar,
    Chars,
    Choice,
    Name,
    Node,
    Ranges,
    Repeat,
    Sequence,
    merged,
    others,
)

MAX_POSITIONS = 300
"""Of a lexeme: the places in its text where a character may stand. Larger ones are taken apart."""
MAX_LEAD = 64
"""Rules from one to the last that it leads to."""
MAX_WORK = 60_000
"""Looks at nodes and positions: a tenth of a second. Beyond it, every lexeme is one character."""
_SURROGATES: Ranges = ((0xD800, 0xDFFF),)
_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")


def to_lark(rules: Mapping[str, Node]) -> str:
    """Raises BadGrammar for rules that name rules that name rules, too deep."""
    loops = _looping(rules)
    if "root" not in loops:
        return _Writer(rules, _Cut(loops, frozenset(), _Work())).text()
    try:
        return _Writer(rules, _cut(rules, loops)).text()
    except _TooMuch:
        return _Writer(rules, _Cut(loops, None, _Work())).text()
    except RecursionError:
        raise BadGrammar("its rules lead too deep") from None


def _cut(rules: Mapping[str, Node], loops: frozenset[str]) -> _Cut:
    """Raises _TooMuch."""
    work = _Work()
    reader = _Reader(rules, work)
    apart: frozenset[Node] = frozenset()
    while True:
        cut = _Cut(loops, apart, work)
        swallowing = _swallowing(_Outline(rules, cut, reader), work)
        if not swallowing:
            return cut
        apart |= swallowing


def _looping(rules: Mapping[str, Node]) -> frozenset[str]:
    """Rules that lead to one that leads back to itself. Raises BadGrammar."""
    named = {rule: set(_names(node)) for rule, node in rules.items()}
    straight: set[str] = set()
    deep = 0
    while more := {r for r, to in named.items() if r not in straight and to <= straight}:
        straight |= more
        deep += 1
        if deep > MAX_LEAD:
            raise BadGrammar(f"its rules lead over {MAX_LEAD} deep")
    return frozenset(rules.keys() - straight)


def _names(node: Node) -> Iterator[str]:
    if isinstance(node, Name):
        yield node.rule
    for part in _parts(node):
        yield from _names(part)


def _parts(node: Node) -> tuple[Node, ...]:
    match node:
        case Chars() | Name():
            return ()
        case Sequence(parts):
            return parts
        case Choice(options):
            return options
        case Repeat(part):
            return (part,)
        case _:
            assert_never(node)


class _TooMuch(Exception):
    pass


@dataclass(slots=True)
class _Work:
    done: int = 0

    def count(self, more: int = 1) -> None:
        self.done += more
        if self.done > MAX_WORK:
            raise _TooMuch


# ------------------------------------------------------------------- what a lexeme may hold


@dataclass(slots=True)
class _Texts:
    """The texts of a lexeme as an automaton of its positions; counted repeats as uncounted ones, which allow
    more."""

    chars: list[int]
    """Of each position, as a set of bits: see `_Alphabet`."""
    nexts: list[set[int]]
    first: set[int]
    last: set[int]
    empty: bool
    begins_with: int = 0
    goes_on_with: int = 0

    def __post_init__(self) -> None:
        self.begins_with = self.any_of(self.first)
        self.goes_on_with = self.any_of(p for after in self.nexts for p in after)

    def any_of(self, positions: Iterable[int]) -> int:
        found = 0
        for position in positions:
            found |= self.chars[position]
        return found


class _TooLarge(Exception):
    pass


class _Alphabet:
    """Sets of characters as numbers, a bit for each run of characters that no rule tells apart."""

    def __init__(self, rules: Mapping[str, Node]) -> None:
        found = {r for node in rules.values() for r in _ranges(node)}
        edges = sorted({edge for ranges in found for a, b in ranges for edge in (a, b + 1)})
        index = {edge: i for i, edge in enumerate(edges)}
        self._bits = {
            ranges: sum((1 << index[b + 1]) - (1 << index[a]) for a, b in ranges)
            for ranges in found
        }

    def bits(self, chars: Chars) -> int:
        return self._bits[chars.ranges]


def _ranges(node: Node) -> Iterator[Ranges]:
    if isinstance(node, Chars):
        yield node.ranges
    for part in _parts(node):
        yield from _ranges(part)


class _Reader:
    """From a lexeme to its `_Texts`; names are read as what they name."""

    def __init__(self, rules: Mapping[str, Node], work: _Work) -> None:
        self._rules = rules
        self._work = work
        self._alphabet = _Alphabet(rules)
        self._known: dict[Node, _Texts | None] = {}
        self._chars: list[int] = []
        self._nexts: list[set[int]] = []

    def read(self, node: Node) -> _Texts | None:
        """None: too large."""
        if node not in self._known:
            self._chars, self._nexts = [], []
            try:
                first, last, empty = self._read(node)
                self._known[node] = _Texts(self._chars, self._nexts, first, last, empty)
            except _TooLarge:
                self._known[node] = None
        return self._known[node]

    def _read(self, node: Node) -> tuple[set[int], set[int], bool]:
        self._work.count()
        match node:
            case Name(rule):
                return self._read(self._rules[rule])
            case Chars():
                if len(self._chars) == MAX_POSITIONS:
                    raise _TooLarge
                self._chars.append(self._alphabet.bits(node))
                self._nexts.append(set())
                here = len(self._chars) - 1
                return {here}, {here}, False
            case Sequence(parts):
                return self._sequence(parts)
            case Choice(options):
                found = [self._read(option) for option in options]
                first = {p for f, _, _ in found for p in f}
                last = {p for _, l, _ in found for p in l}  # noqa: E741
                return first, last, any(empty for _, _, empty in found)
            case Repeat(part, least, most):
                if most == 0:
                    return set(), set(), True
                first, last, empty = self._read(part)
                if most != 1:
                    self._join(last, first)
                return first, last, empty or least == 0
            case _:
                assert_never(node)

    def _sequence(self, parts: Iterable[Node]) -> tuple[set[int], set[int], bool]:
        first: set[int] = set()
        last: set[int] = set()
        empty = True
        for part in parts:
            begins, ends, may_be_empty = self._read(part)
            self._join(last, begins)
            if empty:
                first |= begins
            last = last | ends if may_be_empty else ends
            empty = empty and may_be_empty
        return first, last, empty

    def _join(self, last: set[int], first: set[int]) -> None:
        self._work.count(len(last))
        for position in last:
            self._nexts[position] |= first


# ------------------------------------------------------------------- where lexemes stand


@dataclass(frozen=True, slots=True)
class _Cut:
    """What is a lexeme: what leads to no loop and is not to be taken apart."""

    loops: frozenset[str]
    apart: frozenset[Node] | None
    """None: all but characters."""
    work: _Work

    def is_lexeme(self, node: Node) -> bool:
        if isinstance(node, Chars):
            return True
        if self.apart is None or node == NOTHING or node in self.apart:
            return False
        return self._is_plain(node)

    def parts(self, sequence: Sequence) -> Parts[Node]:
        """What leads to no loop is tried together; when it is taken apart, its end goes first: white space
        stands there, mostly."""
        parts = sequence.parts
        if self.apart is None or len(parts) < 2:
            return parts
        if self._is_plain(sequence):
            return _together(parts[:-1]), parts[-1]
        found: list[Node] = []
        for plain, run in groupby(parts, self._is_plain):
            together = tuple(run)
            found += [_together(together)] if plain else together
        return found

    def _is_plain(self, node: Node) -> bool:
        self.work.count()
        if isinstance(node, Name):
            return node.rule not in self.loops
        return all(map(self._is_plain, _parts(node)))


def _together(parts: tuple[Node, ...]) -> Node:
    return parts[0] if len(parts) == 1 else Sequence(parts)


class _Outline:
    """The rules that are no lexemes, the lexemes in them, and what may follow each."""

    def __init__(self, rules: Mapping[str, Node], cut: _Cut, reader: _Reader) -> None:
        self._cut = cut
        self._bodies: dict[str, Node] = {}
        self.lexemes: dict[Node, _Texts | None] = {}
        """None: too large."""
        self.follows: dict[Node, int] = {}
        """The characters that may come after a lexeme."""
        self._begins: dict[str, tuple[int, bool]] = {}
        """Of a rule: the characters that its texts begin with, and whether one is empty."""
        self._after: dict[str, int] = {}
        waiting = ["root"]
        while waiting:
            rule = waiting.pop()
            if rule not in self._bodies:
                self._bodies[rule] = rules[rule]
                waiting += self._walk(rules[rule], reader)
        self._settle()

    def _walk(self, node: Node, reader: _Reader) -> Iterator[str]:
        """Notes the lexemes of a rule; the other rules that it names."""
        if self._cut.is_lexeme(node):
            self.lexemes[node] = reader.read(node)
        elif isinstance(node, Name):
            yield node.rule
        else:
            inner = self._cut.parts(node) if isinstance(node, Sequence) else _parts(node)
            for part in inner:
                yield from self._walk(part, reader)

    def _settle(self) -> None:
        self._begins = dict.fromkeys(self._bodies, (0, False))
        self._after = dict.fromkeys(self._bodies, 0)
        self.follows = dict.fromkeys(self.lexemes, 0)
        while (now := {r: self._beginning(n) for r, n in self._bodies.items()}) != self._begins:
            self._begins = now
        before: object = None
        while before != (after := (dict(self._after), dict(self.follows))):
            before = after
            for rule, node in self._bodies.items():
                self._follow(node, self._after[rule])

    def _beginning(self, node: Node) -> tuple[int, bool]:
        self._cut.work.count()
        if node in self.lexemes:
            texts = self.lexemes[node]
            return (0, False) if texts is None else (texts.begins_with, texts.empty)
        match node:
            case Name(rule):
                return self._begins[rule]
            case Sequence():
                return self._sequence(self._cut.parts(node), 0, True)
            case Choice(options):
                found = [self._beginning(option) for option in options]
                return functools.reduce(or_, (b for b, _ in found)), any(e for _, e in found)
            case Repeat(part, least, most):
                begins, empty = self._beginning(part)
                return (0, True) if most == 0 else (begins, empty or least == 0)
            case _:
                raise AssertionError("characters are lexemes")

    def _sequence(self, parts: Parts[Node], after: int, empty: bool) -> tuple[int, bool]:
        """What parts begin with that `after` comes behind."""
        for part in reversed(parts):
            begins, may_be_empty = self._beginning(part)
            after, empty = (begins | after, empty) if may_be_empty else (begins, False)
        return after, empty

    def _follow(self, node: Node, after: int) -> None:
        self._cut.work.count()
        if node in self.lexemes:
            self.follows[node] |= after
            return
        match node:
            case Name(rule):
                self._after[rule] |= after
            case Sequence():
                parts = self._cut.parts(node)
                for i, part in enumerate(parts):
                    self._follow(part, self._sequence(parts[i + 1 :], after, False)[0])
            case Choice(options):
                for option in options:
                    self._follow(option, after)
            case Repeat(part, _, most):
                again = 0 if most in (0, 1) else self._beginning(part)[0]
                self._follow(part, after | again)
            case _:
                raise AssertionError("characters are lexemes")


def _swallowing(outline: _Outline, work: _Work) -> frozenset[Node]:
    """Lexemes that can get longer where another one, or itself, may have ended."""
    found = {node for node, texts in outline.lexemes.items() if texts is None}
    texts = {node: t for node, t in outline.lexemes.items() if t is not None}
    for longer, b in texts.items():
        goes_on, begins = b.goes_on_with, b.begins_with
        work.count(len(texts))
        for node, a in texts.items():
            follow = outline.follows[node] & goes_on
            if follow and a.begins_with & begins and _swallows(a, b, follow, work):
                found.add(longer)
                break
    return frozenset(found)


def _swallows(a: _Texts, b: _Texts, follow: int, work: _Work) -> bool:
    """Whether a text of `a` is the beginning of one of `b` that a character of `follow` continues."""
    seen: set[tuple[int, int]] = set()
    waiting = [(p, q) for p in a.first for q in b.first if a.chars[p] & b.chars[q]]
    while waiting:
        pair = p, q = waiting.pop()
        if pair in seen:
            continue
        seen.add(pair)
        work.count()
        if p in a.last and b.any_of(b.nexts[q]) & follow:
            return True
        waiting += [(r, s) for r in a.nexts[p] for s in b.nexts[q] if a.chars[r] & b.chars[s]]
    return False


# ------------------------------------------------------------------- writing Lark


class _Writer:
    """Names of its own: those of GBNF's rules may mean something else in Lark."""

    def __init__(self, rules: Mapping[str, Node], cut: _Cut) -> None:
        self._rules = rules
        self._cut = cut
        self._names: dict[tuple[str, Node], str] = {}
        self._waiting: list[tuple[str, Node, bool]] = []

    def text(self) -> str:
        lines = [f"start: {self._part(Name('root'), whole=False)}"]
        while self._waiting:
            name, node, whole = self._waiting.pop()
            lines.append(f"{name}: {self._body(node, whole=whole)}")
        return "\n".join(lines)

    def _part(self, node: Node, *, whole: bool) -> str:
        """`whole`: inside of a lexeme."""
        if isinstance(node, Chars):
            return f"/{_class(node.ranges)}/"
        if isinstance(node, Name):
            as_lexeme = whole or self._cut.is_lexeme(node)
            return self._named(node, self._rules[node.rule], whole=as_lexeme)
        if not whole and self._cut.is_lexeme(node):
            return self._named(node, node, whole=True)
        return f"({self._body(node, whole=whole)})"

    def _named(self, node: Node, body: Node, *, whole: bool) -> str:
        key = "T" if whole else "r", node
        if key not in self._names:
            self._names[key] = f"{key[0]}{len(self._names)}"
            self._waiting.append((self._names[key], body, whole))
        return self._names[key]

    def _body(self, node: Node, *, whole: bool) -> str:
        match node:
            case Chars() | Name():
                return self._part(node, whole=whole)
            case Sequence(parts):
                inner = parts if whole else self._cut.parts(node)
                return " ".join(self._part(part, whole=whole) for part in inner) or '""'
            case Choice(options):
                return " | ".join(self._part(option, whole=whole) for option in options)
            case Repeat(part, least, most):
                if most == 0:
                    return '""'
                bounds = f"{{{least},{'' if most is None else most}}}"
                return self._part(part, whole=whole) + bounds
            case _:
                assert_never(node)


def _class(ranges: Ranges) -> str:
    """No text has surrogates."""
    allowed = others(merged([*others(ranges), *_SURROGATES]))
    pairs = (_code(a) if a == b else f"{_code(a)}-{_code(b)}" for a, b in allowed)
    return f"[{''.join(pairs)}]"


def _code(code: int) -> str:
    return chr(code) if chr(code) in _LETTERS else f"\\u{{{code:x}}}"
