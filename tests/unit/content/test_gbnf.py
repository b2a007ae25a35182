"""GBNF's notation: what it says, and what is refused."""

from __future__ import annotations

import pytest

from mlx_serving.content.gbnf import (
    LAST,
    BadGrammar,
    Chars,
    Choice,
    Name,
    Node,
    Repeat,
    Sequence,
    merged,
    others,
    parse,
)

A, B = Chars(((97, 97),)), Chars(((98, 98),))


@pytest.mark.parametrize(
    ("text", "node"),
    [
        ('"a"', A),
        ('"ab"*', Repeat(Sequence((A, B)), 0, None)),
        ('"a" "b"? # then', Sequence((A, Repeat(B, 0, 1)))),
        ('"a" | root | ""', Choice((A, Name("root"), Sequence(())))),
        ('("a" |\n "b"\n){2}', Repeat(Choice((A, B)), 2, 2)),
        ('"a"{2,}', Repeat(A, 2, None)),
        ('"a"{ 2 , 5 }+', Repeat(Repeat(A, 2, 5), 1, None)),
        ("[a-bb]", Chars(((97, 98),))),
        ("[^b-]", Chars(((0, 44), (46, 97), (99, LAST)))),
        (r'[\]\x41\u00e9\U0001F600]', Chars(((65, 65), (93, 93), (233, 233), (0x1F600, 0x1F600)))),
        (".", Chars(((0, LAST),))),
        ('""', Sequence(())),
    ],
)  # fmt: skip
def test_what_it_says(text: str, node: Node) -> None:
    assert parse(f"root ::= {text}\n\n# the end")["root"] == node
    assert parse(f"  root ::=\n {text}\r\nother-1::=root") == {
        "root": node,
        "other-1": Name("root"),
    }


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no rule 'root'"),
        ('a ::= "b"', "no rule 'root'"),
        ("root ::= other", "no rule is called 'other'"),
        ('root ::= "a"\nroot ::= "b"', "'root' is there twice"),
        ('root = "a"', r"line 1: expected '::=', found '= \"a\"'"),
        ('root ::= "a\n"', "expected the end of a text"),
        ('root ::= "a', "expected the end of a text"),
        ("root ::= [a", "expected the end of a text"),
        (r'root ::= "\d"', "expected one of"),
        (r'root ::= "\x4"', "expected one of"),
        ('root ::= "\\', "expected one of"),
        (r'root ::= "\uD800"', "no character 0xd800"),
        (r'root ::= "\UFFFFFFFF"', "no character"),
        ("root ::= [b-a]", "ends before it begins"),
        ("root ::= []", "no character is in one"),
        (r"root ::= [^\x00-\U0010FFFF]", "no character is in one"),
        ('root ::= ("a"', r"expected '\)'"),
        ('root ::= "a")', "expected a rule's end"),
        ('root ::= "a"{', "expected a number"),
        ('root ::= "a"{3,2}', "at least 3 and at most 2"),
        ('root ::= "a"{9999}', "over 2000 times"),
        ('root ::= "a"+++++', "over 4 times over"),
        ("root ::= <think>", "expected a rule's end, found '<think>'"),
        ('root ::= * "a"', "expected a rule's end"),
        ("root ::= " + "(" * 40 + '"a"' + ")" * 40, "over 16 deep"),
        ('root ::= "' + "a" * 4000 + '"', "over 3000 parts"),
        ('root ::= "a"\n' + "\n".join(f'r{i} ::= "a"' for i in range(600)), "over 500 rules"),
    ],
)
def test_what_is_refused(text: str, why: str) -> None:
    with pytest.raises(BadGrammar, match=why):
        parse(text)


def test_ranges() -> None:
    assert merged([(5, 6), (1, 2), (3, 3), (6, 9)]) == ((1, 3), (5, 9))
    assert others(((0, 3), (5, LAST))) == ((4, 4),)
    assert others(()) == ((0, LAST),)
    assert others(((0, LAST),)) == ()
