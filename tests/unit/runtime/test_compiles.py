"""Grammars on threads: once for all who ask, not at all for nobody, errors to those who asked."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import pytest

from mlx_serving.errors import InvalidRequest
from mlx_serving.runtime.compiles import THREADS, Compiled, Compiles
from mlx_serving.runtime.core.plan import Matcher
from mlx_serving.types import Grammar

WAIT_S = 60
"""A guard against hangs."""


class Panic(BaseException):
    """What a library's abort looks like."""


@dataclass(frozen=True)
class Constraint:
    text: str

    def matcher(self, output: Iterable[int]) -> Matcher:
        raise NotImplementedError


@dataclass(eq=False)
class Compiler:
    """Compiles nothing before it may."""

    may: threading.Event = field(default_factory=threading.Event)
    began: list[str] = field(default_factory=list)
    begun: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def known(self, grammar: Grammar) -> Constraint | None:
        return Constraint("known") if grammar.text == "known" else None

    def compile(self, grammar: Grammar) -> Constraint:
        self.began.append(grammar.text)
        self.begun.release()
        assert self.may.wait(WAIT_S)
        if grammar.text == "bad":
            raise InvalidRequest("nothing can satisfy it", param=grammar.param)
        if grammar.text == "panic":
            raise Panic("unreachable code")
        return Constraint(grammar.text)

    def wait_for(self, count: int) -> None:
        for _ in range(count):
            assert self.begun.acquire(timeout=WAIT_S)


class Bench:
    """Compiles, and what was taken from it."""

    def __init__(self) -> None:
        self._rung = threading.Semaphore(0)
        self.compiles = Compiles(self._rung.release)

    def take(self, count: int) -> list[Compiled]:
        found: list[Compiled] = []
        while len(found) < count:
            assert self._rung.acquire(timeout=WAIT_S)
            found += self.compiles.take()
        return sorted(found, key=lambda one: one.seq_id)


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.compiles.close()


def grammar(text: str, param: str = "guided_regex") -> Grammar:
    return Grammar(kind="regex", text=text, param=param)


def test_those_who_ask_for_the_same_wait_for_one(bench: Bench) -> None:
    compiler = Compiler()
    for seq_id in (1, 2):
        bench.compiles.ask(seq_id, compiler, grammar("a"))
    bench.compiles.ask(3, compiler, grammar("b"))
    assert len(bench.compiles) == 3
    compiler.may.set()
    one, two, three = bench.take(3)
    assert one.outcome is two.outcome and one.outcome == Constraint("a")
    assert three.outcome == Constraint("b")
    assert sorted(compiler.began) == ["a", "b"] and not bench.compiles


def test_what_nobody_waits_for_any_more_is_not_begun(bench: Bench) -> None:
    compiler = Compiler()
    for seq_id in range(THREADS):
        bench.compiles.ask(seq_id, compiler, grammar(f"busy {seq_id}"))
    compiler.wait_for(THREADS)
    bench.compiles.ask(10, compiler, grammar("left"))
    bench.compiles.ask(11, compiler, grammar("wanted by two"))
    bench.compiles.ask(12, compiler, grammar("wanted by two"))
    for seq_id in (0, 10, 11, 99):
        bench.compiles.forget(seq_id)
    bench.compiles.ask(13, compiler, grammar("busy 0"))
    compiler.may.set()
    taken = bench.take(THREADS + 1)
    assert [one.seq_id for one in taken] == [*range(1, THREADS), 12, 13]
    assert taken[-1].outcome == Constraint("busy 0")
    assert "left" not in compiler.began and len(compiler.began) == THREADS + 1
    assert not bench.compiles


def test_an_error_names_its_own_field_and_a_panic_is_one_too(bench: Bench) -> None:
    compiler = Compiler()
    compiler.may.set()
    bench.compiles.ask(1, compiler, grammar("bad", "guided_regex"))
    bench.compiles.ask(2, compiler, grammar("bad", "format"))
    bench.compiles.ask(3, compiler, grammar("panic"))
    first, second, third = [one.outcome for one in bench.take(3)]
    assert isinstance(first, InvalidRequest) and first.param == "guided_regex"
    assert isinstance(second, InvalidRequest) and second.param == "format"
    assert isinstance(third, Panic)


def test_models_compile_for_themselves(bench: Bench) -> None:
    compilers = [Compiler(), Compiler()]
    for seq_id, compiler in enumerate(compilers):
        compiler.may.set()
        bench.compiles.ask(seq_id, compiler, grammar("a"))
    bench.take(2)
    assert [compiler.began for compiler in compilers] == [["a"], ["a"]]
