"""Rows stay dense, and what `settle` tells a runner leads it to the same rows."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mlx_serving.runtime.core.rows import Rows
from mlx_serving.runtime.core.sequence import Sequence
from mlx_serving.types import SamplingParams


def sequence(seq_id: int) -> Sequence:
    return Sequence(seq_id=seq_id, tokens=[1], prompt_len=1, sampling=SamplingParams())


def test_a_start_takes_the_hole_and_nothing_moves() -> None:
    rows = Rows()
    a, b, c, d = map(sequence, range(4))
    for seq in (a, b, c):
        rows.join(seq)
    assert rows.settle() == ((), ())
    rows.release(a)
    rows.join(d)
    assert len(rows) == 3
    assert rows.settle() == ((0,), ())
    assert (d.row, b.row, c.row) == (0, 1, 2)


def test_the_last_row_moves_into_a_hole() -> None:
    rows = Rows()
    a, b, c = map(sequence, range(3))
    for seq in (a, b, c):
        rows.join(seq)
    rows.settle()
    rows.release(a)
    assert rows.unsettled
    assert rows.settle() == ((0,), ((2, 0),))
    assert rows.slots == [c, b] and c.row == 0 and a.row is None
    assert not rows.unsettled


@given(st.lists(st.lists(st.integers(-3, 9), max_size=6), max_size=20))
def test_a_runner_that_obeys_has_the_same_rows(steps: list[list[int]]) -> None:
    """Each step: negative numbers join, others release that row if it is in use."""
    rows = Rows()
    device: dict[int, int] = {}
    names = iter(range(1000))
    for step in steps:
        joining = []
        for action in step:
            if action < 0:
                joining.append(sequence(next(names)))
                rows.join(joining[-1])
            elif action < len(rows.slots) and (seq := rows.slots[action]) is not None:
                rows.release(seq)
        count = len(rows)
        frees, moves = rows.settle()
        for row in frees:
            del device[row]
        for source, to in moves:
            assert to not in device
            device[to] = device.pop(source)
        for seq in joining:
            assert seq.row is not None and seq.row not in device
            device[seq.row] = seq.seq_id
        assert sorted(device) == list(range(count)) and len(rows) == count
        assert {seq.row: seq.seq_id for seq in rows} == device
        assert len(moves) <= max(0, len(frees) - len(joining)), "more rows move than must"
