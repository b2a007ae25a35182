"""GBNF as Lark, through llguidance, against reading the rules as they are, character by character."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

import byte_vocabulary
from mlx_serving.content import gbnf, lexemes
from mlx_serving.content.gbnf import Chars, Choice, Name, Node, Repeat, Sequence

LETTERS = "ab"
TEXTS = ["".join(t) for n in range(5) for t in itertools.product(LETTERS, repeat=n)]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> LLTokenizer:
    path: Path = byte_vocabulary.write(tmp_path_factory.mktemp("bytes"), eos=0)
    return LLTokenizer(path.read_text(), n_vocab=256, eos_token=[0])


def allows(vocabulary: LLTokenizer, lark: str) -> LLMatcher:
    matcher = LLMatcher(vocabulary, LLMatcher.grammar_from_lark(lark), log_level=0)
    assert not matcher.is_error(), (lark, matcher.get_error())
    return matcher


def is_allowed(matcher: LLMatcher, text: str) -> bool:
    matcher.reset()
    data = list(text.encode())
    return bool(matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting())


class Oracle:
    """All ends of what a node makes of a text from a place on; loops until nothing is added."""

    def __init__(self, rules: Mapping[str, Node]) -> None:
        self._rules = rules

    def allows(self, text: str) -> bool:
        self._text = text
        self._known: dict[tuple[str, int], frozenset[int]] = {}
        before: object = None
        while before != self._known:
            before = dict(self._known)
            for rule, node in self._rules.items():
                for at in range(len(text) + 1):
                    self._known[rule, at] = frozenset(self._ends(node, at))
        return len(text) in self._known["root", 0]

    def _ends(self, node: Node, at: int) -> set[int]:
        match node:
            case Chars(ranges):
                here = self._text[at : at + 1]
                return {at + 1} if here and any(a <= ord(here) <= b for a, b in ranges) else set()
            case Name(rule):
                return set(self._known.get((rule, at), ()))
            case Choice(options):
                return {end for option in options for end in self._ends(option, at)}
            case Sequence(parts):
                ends = {at}
                for part in parts:
                    ends = {end for begin in ends for end in self._ends(part, begin)}
                return ends
            case Repeat(part, least, most):
                ends, reached = {at}, {at} if least == 0 else set()
                for times in range(1, min(most if most is not None else 99, least + 6) + 1):
                    ends = {end for begin in ends for end in self._ends(part, begin)}
                    reached |= ends if times >= least else set()
                return reached


def both(vocabulary: LLTokenizer, rules: Mapping[str, Node], texts: list[str]) -> list[str]:
    matcher, oracle = allows(vocabulary, lexemes.to_lark(rules)), Oracle(rules)
    found = [text for text in texts if is_allowed(matcher, text)]
    assert found == [text for text in texts if oracle.allows(text)]
    return found


RULES = ("root", "x", "y", "z")
leaves = st.sampled_from(
    [Chars(((97, 97),)), Chars(((98, 98),)), Chars(((97, 98),)), *map(Name, RULES)]
)
nodes: st.SearchStrategy[Node] = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda parts: Sequence(tuple(parts))),
        st.lists(inner, min_size=2, max_size=3).map(lambda options: Choice(tuple(options))),
        st.tuples(inner, st.sampled_from([(0, None), (1, None), (0, 1), (2, 3), (0, 0)])).map(
            lambda pair: Repeat(pair[0], *pair[1])
        ),
    ),
    max_leaves=6,
)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.fixed_dictionaries(dict.fromkeys(RULES, nodes)))
def test_random_rules_allow_what_they_say(vocabulary: LLTokenizer, rules: dict[str, Node]) -> None:
    if any(map(Oracle(rules).allows, TEXTS)):
        both(vocabulary, rules, TEXTS)


ARITHMETIC = r"""
root  ::= (expr "=" ws term "\n")+
expr  ::= term ([-+*/] ws term)*
term  ::= ident | num | "(" ws expr ")" ws   # white space in the end
ident ::= [a-z] [a-z0-9_]* ws
num   ::= [0-9]+ ws
ws    ::= [ \t\n]*
"""
JSON = r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws ( string ":" ws value ("," ws string ":" ws value)* )? "}" ws
array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
ws     ::= | " " | "\n" [ \t]{0,20}
"""


@pytest.mark.parametrize(
    ("text", "allowed", "refused"),
    [
        (ARITHMETIC, ["1=1\n", "ab+(2 * c_3)=3\n\n4=1\n", "1\n\n=1\n\n"], ["1=1", "1+=1\n", "=\n"]),
        (JSON, ['{"a": [1, 2.5e-3, true]}', '{"é\\n" :{}}', "{}\n\t"], ["{,}", '{"a": 01}', "[]"]),
        ('root ::= "yes" | "no"', ["yes", "no"], ["", "n", "yesno"]),
        ("root ::= word word\nword ::= [a-z]+", ["ab"], ["a"]),
        ("root ::= ab root | ab\nab ::= [a-z]+ | .", ["a", "ab\né"], [""]),
        ('root ::= "(" root ")" | ""', ["", "(())"], ["(", "())"]),
        ('root ::= root "a" | "b"', ["b", "baa"], ["a", "bb"]),
        (r'root ::= [&&~\]\[\\-]{2} "\u00e9\U0001F600\x41"?', ["&&", "-]é😀A"], ["&", "ab"]),
        ('root ::= ("a" "b"){2} "c"*', ["abab", "ababcc"], ["abb", "ab"]),
        ('root ::= "%json" (root | [^a-z])', ["%json.", "%json%json\n"], ["%json", "%jsonx"]),
    ],
)
def test_grammars_as_people_write_them(
    vocabulary: LLTokenizer, text: str, allowed: list[str], refused: list[str]
) -> None:
    assert both(vocabulary, gbnf.parse(text), allowed + refused) == allowed


def test_what_takes_long_is_read_by_characters() -> None:
    words = " | ".join(f"w{i} root" for i in range(200))
    more = "\n".join(f"w{i} ::= [a-z]{{1,3}} [ab]* [c-z]+" for i in range(200))
    rules = gbnf.parse(f'root ::= "." | {words}\n{more}')
    lark = lexemes.to_lark(rules)
    assert "T" not in lark


def test_characters_alone_say_the_same(vocabulary: LLTokenizer) -> None:
    rules = gbnf.parse(ARITHMETIC)
    cut = lexemes._Cut(lexemes._looping(rules), None, lexemes._Work())
    lark = lexemes._Writer(rules, cut).text()
    assert "T" not in lark
    assert is_allowed(allows(vocabulary, lark), "ab+(2 * c_3)=3\n\n4=1\n")


def test_rules_that_lead_deep_are_refused() -> None:
    deep = "\n".join(f"r{i} ::= r{i + 1} r{i + 1}" for i in range(99))
    with pytest.raises(gbnf.BadGrammar, match="64 deep"):
        lexemes.to_lark(gbnf.parse(f'root ::= r0 root | "a"\n{deep}\nr99 ::= "a"'))
