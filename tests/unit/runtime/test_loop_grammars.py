"""Grammars in the loop: compiled while their sequences queue and others' steps go on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import msgspec
import pytest

from mlx_serving import errors
from mlx_serving.runtime.compiles import Compiles
from mlx_serving.runtime.model import Model
from mlx_serving.types import Grammar
from mlx_serving.worker import wire
from unit.runtime.test_compiles import Compiler
from unit.runtime.test_loop import Parent, load, loaded, serving, submit


@pytest.fixture
def compiler() -> Compiler:
    return Compiler()


@pytest.fixture
def parent(compiler: Compiler) -> Iterator[Parent]:
    def begin(model_id, path, options, on_phase):
        yield
        return replace(loaded(model_id), grammars=compiler)

    with serving(begin, heartbeat_s=0.01, pulse_s=0.01) as parent:
        yield parent
        compiler.may.set()


def held_to(text: str, request: wire.Submit) -> wire.Submit:
    grammar = Grammar(kind="regex", text=text, param="guided_regex")
    return msgspec.structs.replace(request, grammar=grammar)


def test_others_go_on_while_it_compiles(parent: Parent, compiler: Compiler) -> None:
    parent.send(load(), held_to("a", submit(1, 10)), held_to("a", submit(2, 20)), submit(3, 30))
    assert parent.rows(1)[3].token_ids == [31, 32, 33, 34]
    compiler.may.set()
    rows = parent.rows(2)
    assert rows[1].token_ids == [11, 12, 13, 14] and rows[2].token_ids == [21, 22, 23, 24]
    assert compiler.began == ["a"]


def test_one_that_is_known_waits_for_nothing(parent: Parent, compiler: Compiler) -> None:
    parent.send(load(), held_to("known", submit(1, 10)))
    assert parent.rows(1)[1].token_ids == [11, 12, 13, 14]
    assert compiler.began == []


def test_one_that_is_none_ends_its_sequence_alone(parent: Parent, compiler: Compiler) -> None:
    compiler.may.set()
    parent.send(load(), held_to("bad", submit(1, 10)), held_to("panic", submit(2, 20)))
    parent.send(submit(3, 30), held_to("a", submit(4, 40)))
    rows = parent.rows(4)
    assert rows[1].error == (errors.InvalidRequest.code, "nothing can satisfy it")
    assert rows[1].error_param == "guided_regex"
    assert rows[2].error == ("internal_error", "Panic: unreachable code")
    assert rows[3].token_ids == [31, 32, 33, 34] and rows[4].token_ids == [41, 42, 43, 44]


def test_who_is_cancelled_meanwhile_is_heard_of_no_more(parent: Parent, compiler: Compiler) -> None:
    parent.send(load(), held_to("a", submit(1, 10)), held_to("bad", submit(2, 20)))
    compiler.wait_for(2)
    parent.send(wire.Cancel(1), wire.Cancel(2))
    parent.expect(wire.Phase, lambda phase: phase.phase == "idle")
    compiler.may.set()
    parent.send(held_to("a", submit(3, 30)))
    assert parent.rows(1)[3].token_ids == [31, 32, 33, 34]


def test_a_slow_reader_pauses_it_meanwhile(parent: Parent, compiler: Compiler) -> None:
    parent.send(load(), held_to("a", submit(1, 10)), wire.Pause(1))
    compiler.wait_for(1)
    compiler.may.set()
    parent.expect(wire.Phase, lambda phase: phase.phase == "idle")
    parent.send(wire.Resume(1))
    assert parent.rows(1)[1].token_ids == [11, 12, 13, 14]


def test_who_only_compiles_says_so_without_getting_on(parent: Parent, compiler: Compiler) -> None:
    """What tells the watchdog of a compiler that hangs: heartbeats do not count as progress."""
    parent.send(load(), held_to("a", submit(1, 10)))
    # Each heartbeat wakes the loop: were that another phase, the time would begin anew.
    long_s = 0.2
    parent.expect(wire.Phase, lambda p: p.phase == "compiling" and p.elapsed_s > long_s)
    compiler.may.set()
    parent.rows(1)
    parent.expect(wire.Phase, lambda phase: phase.phase == "idle")


def test_unloading_its_model_ends_it(parent: Parent, compiler: Compiler) -> None:
    parent.send(load(), load("n"), held_to("a", submit(1, 10)), submit(2, 20, model_id="n"))
    compiler.wait_for(1)
    parent.send(wire.UnloadModel("m"))
    rows = parent.rows(2)
    assert rows[1].error is not None and rows[1].error[0] == errors.ModelNotFound.code
    assert rows[2].token_ids == [21, 22, 23, 24]


def test_what_became_of_it_is_told_though_its_model_leaves(compiler: Compiler) -> None:
    compiles = Compiles(ring=lambda: None)
    model = Model(replace(loaded("m"), grammars=compiler), depth=2, compiles=compiles)
    model.submit(held_to("bad", submit(1, 10)))
    model.submit(submit(2, 20))
    model.compiled(1, errors.InvalidRequest("nothing can satisfy it", param="p"))
    told = {row.seq_id: row.error for row in model.end_all("gone", "it was unloaded").rows}
    assert told == {
        1: (errors.InvalidRequest.code, "nothing can satisfy it"),
        2: ("gone", "it was unloaded"),
    }
    compiler.may.set()
    compiles.close()


def test_for_measurements_it_is_compiled_in_the_loop(parent: Parent, compiler: Compiler) -> None:
    compiler.may.set()
    parent.send(load(unprepared=("grammar", "hash")))
    parent.send(held_to("a", submit(1, 10)), held_to("bad", submit(2, 20)))
    told: list[str] = []
    rows: dict[int, wire.TokenRow] = {}
    while "prefill" not in told or 2 not in rows:
        step = parent.expect(wire.Step)
        told += [] if step.stats is None else [stage for stage, _ in step.stats.stages]
        rows |= {row.seq_id: row for row in step.rows}
    assert rows[2].error is not None and rows[2].error_param == "guided_regex"
    assert sorted(told) == ["grammar", "prefill", "queue"]


def test_what_it_waited_is_told(parent: Parent, compiler: Compiler) -> None:
    compiler.may.set()
    parent.send(load(), held_to("a", submit(1, 10)), held_to("known", submit(2, 20)))
    told: list[str] = []
    while told.count("prefill") < 2:
        told += [stage for stage, _ in parent.expect(wire.Step).stats.stages]
    assert sorted(told) == sorted(["grammar", "hash", "queue", "prefill"] * 2)
