"""llama.cpp's grammar notation, GBNF: its rules as a tree. `lexemes` makes a Lark grammar of them.

root ::= "a" [b-z]* | "(" root ")"     a rule ends where its line does, unless in parentheses
" "  [a-z] [^a-z] .  name  ( )         texts, characters, other characters, any, a rule, a group
* + ? {2} {2,} {2,5}                   repeats what stands before
\\t \\r \\n \\\\ \\" \\[ \\] \\x41 \\u0041 \\U00000041
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

MAX_RULES = 500
MAX_NODES = 3_000
MAX_DEPTH = 16
MAX_REPEATS = 2_000
MAX_NESTED_REPEATS = 4
"""One behind the other, without parentheses."""
LAST = 0x10FFFF

Ranges = tuple[tuple[int, int], ...]
"""First and last code points, sorted, apart."""


class BadGrammar(Exception):
    """Why a text is no grammar that is followed here."""


@dataclass(frozen=True, slots=True)
class Chars:
    """One character of these."""

    ranges: Ranges


@dataclass(frozen=True, slots=True)
class Name:
    """What another rule says."""

    rule: str


@dataclass(frozen=True, slots=True)
class Sequence:
    """One after the other; nothing, where it is empty."""

    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    options: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """`most`: None where there is no bound."""

    part: Node
    least: int
    most: int | None


Node = Chars | Name | Sequence | Choice | Repeat
NOTHING = Sequence(())
_ESCAPES = {"t": "\t", "r": "\r", "n": "\n", "\\": "\\", '"': '"', "[": "[", "]": "]"}
_HEX = {"x": 2, "u": 4, "U": 8}
_REPEATS = {"*": (0, None), "+": (1, None), "?": (0, 1)}


def parse(text: str) -> Mapping[str, Node]:
    """The rules by name; `root` is there, and every rule that one names. Raises BadGrammar."""
    reader = _Reader(text)
    rules = reader.rules()
    if "root" not in rules:
        raise BadGrammar("it has no rule 'root'")
    for name in reader.named:
        if name not in rules:
            raise BadGrammar(f"no rule is called {name[:64]!r}")
    return rules


def merged(ranges: Ranges | list[tuple[int, int]]) -> Ranges:
    found: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if found and first <= found[-1][1] + 1:
            found[-1] = found[-1][0], max(found[-1][1], last)
        else:
            found.append((first, last))
    return tuple(found)


def others(ranges: Ranges) -> Ranges:
    edges = [-1, *(edge for pair in ranges for edge in pair), LAST + 1]
    gaps = zip(edges[::2], edges[1::2], strict=True)
    return tuple((before + 1, after - 1) for before, after in gaps if before + 1 < after)


@dataclass(slots=True)
class _Reader:
    text: str
    at: int = 0
    nodes: int = 0
    named: dict[str, None] = field(default_factory=dict)

    def rules(self) -> dict[str, Node]:
        rules: dict[str, Node] = {}
        self._space(lines=True)
        while self._here():
            name = self._name()
            self._space()
            self._expect("::=")
            self._space(lines=True)
            if name in rules:
                raise BadGrammar(f"the rule {name[:64]!r} is there twice")
            rules[name] = self._choice(MAX_DEPTH, grouped=False)
            if len(rules) > MAX_RULES:
                raise BadGrammar(f"it has over {MAX_RULES} rules")
            if self._here() not in ("", "\r", "\n"):
                raise self._wrong("a rule's end")
            self._space(lines=True)
        return rules

    def _choice(self, depth: int, *, grouped: bool) -> Node:
        if not depth:
            raise BadGrammar(f"its groups are over {MAX_DEPTH} deep")
        options = [self._sequence(depth, grouped=grouped)]
        while self._here() == "|":
            self.at += 1
            self._space(lines=True)
            options.append(self._sequence(depth, grouped=grouped))
        return options[0] if len(options) == 1 else Choice(tuple(options))

    def _sequence(self, depth: int, *, grouped: bool) -> Node:
        parts: list[Node] = []
        while (c := self._here()) and (c in '"[.(' or _is_word(c)):
            if c == '"':
                found: list[Node] = list(self._literal())
            elif c == "[":
                found = [self._class()]
            elif c == ".":
                self.at += 1
                found = [Chars(((0, LAST),))]
            elif c == "(":
                self.at += 1
                self._space(lines=True)
                found = [self._choice(depth - 1, grouped=True)]
                self._expect(")")
            else:
                name = self._name()
                self.named[name] = None
                found = [Name(name)]
            self._count(len(found))
            self._space(lines=grouped)
            parts += self._repeated(found)
            self._space(lines=grouped)
        return parts[0] if len(parts) == 1 else Sequence(tuple(parts))

    def _repeated(self, found: list[Node]) -> list[Node]:
        """A text is repeated as a whole, as llama.cpp has it."""
        times = 0
        while (c := self._here()) and c in "*+?{":
            self.at += 1
            times += 1
            if times > MAX_NESTED_REPEATS:
                raise BadGrammar(f"it repeats a repeat over {MAX_NESTED_REPEATS} times over")
            least, most = _REPEATS[c] if c != "{" else self._bounds()
            part = found[0] if len(found) == 1 else Sequence(tuple(found))
            found = [Repeat(part, least, most)]
            self._count(1)
        return found

    def _bounds(self) -> tuple[int, int | None]:
        self._space(lines=True)
        least = self._number()
        most: int | None = least
        self._space(lines=True)
        if self._here() == ",":
            self.at += 1
            self._space(lines=True)
            most = None if self._here() == "}" else self._number()
            self._space(lines=True)
        self._expect("}")
        if max(least, most or 0) > MAX_REPEATS:
            raise BadGrammar(f"it repeats something over {MAX_REPEATS} times")
        if most is not None and most < least:
            raise BadGrammar(f"it repeats something at least {least} and at most {most} times")
        return least, most

    def _literal(self) -> list[Chars]:
        found: list[Chars] = []
        self.at += 1
        while self._here() != '"':
            code = self._character()
            found.append(Chars(((code, code),)))
        self.at += 1
        return found

    def _class(self) -> Chars:
        self.at += 1
        negated = self._here() == "^"
        self.at += negated
        found: list[tuple[int, int]] = []
        while self._here() != "]":
            first = last = self._character()
            if self._here() == "-" and self.text[self.at + 1 : self.at + 2] != "]":
                self.at += 1
                last = self._character()
            if last < first:
                raise BadGrammar("a range of characters ends before it begins")
            found.append((first, last))
        self.at += 1
        ranges = others(merged(found)) if negated else merged(found)
        if not ranges:
            raise BadGrammar("no character is in one of its [ ]")
        return Chars(ranges)

    def _character(self) -> int:
        c = self._here()
        if not c or c in "\r\n":
            raise self._wrong("the end of a text or of [ ]")
        self.at += 1
        if c != "\\":
            return ord(c)
        c = self._here()
        self.at += 1
        if c in _ESCAPES and c:
            return ord(_ESCAPES[c])
        digits = self.text[self.at : self.at + _HEX.get(c, 0)]
        if not digits or len(digits) < _HEX[c] or any(d not in "0123456789abcdefABCDEF" for d in digits):  # fmt: skip
            self.at -= 1
            raise self._wrong(r"one of \t \r \n \\ \" \[ \] \xHH \uHHHH \UHHHHHHHH")
        self.at += len(digits)
        code = int(digits, 16)
        if code > LAST or 0xD800 <= code < 0xE000:
            raise BadGrammar(f"there is no character {code:#x}")
        return code

    def _name(self) -> str:
        begin = self.at
        while (c := self._here()) and _is_word(c):
            self.at += 1
        if self.at == begin:
            raise self._wrong("a rule's name")
        return self.text[begin : self.at]

    def _number(self) -> int:
        begin = self.at
        while (c := self._here()) and c in "0123456789" and self.at < begin + 9:
            self.at += 1
        if self.at == begin:
            raise self._wrong("a number")
        return int(self.text[begin : self.at])

    def _space(self, *, lines: bool = False) -> None:
        while c := self._here():
            if c == "#":
                while self._here() not in ("", "\r", "\n"):
                    self.at += 1
            elif c in " \t" or (lines and c in "\r\n"):
                self.at += 1
            else:
                return

    def _expect(self, token: str) -> None:
        if not self.text.startswith(token, self.at):
            raise self._wrong(repr(token))
        self.at += len(token)

    def _here(self) -> str:
        return self.text[self.at : self.at + 1]

    def _count(self, more: int) -> None:
        self.nodes += more
        if self.nodes > MAX_NODES:
            raise BadGrammar(f"it has over {MAX_NODES} parts")

    def _wrong(self, wanted: str) -> BadGrammar:
        line = self.text.count("\n", 0, self.at) + 1
        return BadGrammar(
            f"line {line}: expected {wanted}, found {self.text[self.at : self.at + 20]!r}"
        )


def _is_word(c: str) -> bool:
    return c.isascii() and (c.isalnum() or c in "-_")
