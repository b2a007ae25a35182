"""Pure decisions: prefill cuts, what rows hold, who gives way."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_serving.runtime.core import policy
from mlx_serving.runtime.core.plan import Limits
from mlx_serving.runtime.core.policy import Ceilings, ceilings
from mlx_serving.runtime.core.rows import bucketed
from mlx_serving.runtime.core.sequence import Sequence
from mlx_serving.types import Priority, SamplingParams


def limits(**changes: int) -> Limits:
    base = {
        "max_num_seqs": 4,
        "prefill_step_size": 8,
        "context_length": 64,
        "kv_capacity_tokens": 256,
        "kv_bucket_tokens": 8,
    }
    return Limits(**(base | changes))


def sequence(length: int, priority: Priority = Priority.NORMAL, arrival: int = 0) -> Sequence:
    seq = Sequence(
        seq_id=arrival,
        tokens=[1] * length,
        prompt_len=length,
        sampling=SamplingParams(max_tokens=1000),
        priority=priority,
    )
    seq.bind(arrival, 64, ())
    return seq


@given(st.integers(1, 300), st.integers(1, 70))
def test_chunks_are_cut_at_multiples_from_zero_and_cover_the_prompt(length: int, step: int) -> None:
    ends, computed = [], 0
    while computed < length:
        computed += policy.chunk_length(computed, length, step)
        ends.append(computed)
    assert ends == [*range(step, length, step), length]


@given(st.integers(0, 10_000), st.integers(1, 512))
def test_a_bucket_is_the_smallest_multiple_that_holds(tokens: int, bucket: int) -> None:
    capacity = bucketed(tokens, bucket)
    assert capacity % bucket == 0 and capacity - bucket < tokens <= capacity


@given(st.lists(st.integers(1, 63), max_size=8), st.integers(0, 80), st.booleans())
def test_rows_are_as_wide_as_the_longest_unless_each_has_its_own(
    lengths: list[int], ahead: int, own: bool
) -> None:
    sequences = [sequence(n, arrival=i) for i, n in enumerate(lengths)]
    widths = [bucketed(min(n + ahead, 63), 8) for n in lengths]
    taken = sum(widths) if own else len(widths) * max(widths, default=0)
    ours = limits(kv_own_rows=own)
    assert policy.row_tokens(sequences, ours, ahead=ahead) == taken
    assert policy.fits(sequences, ours, ahead=ahead) == (taken <= 256)


def test_memory_may_hold_less_than_the_context() -> None:
    assert policy.usable_context(limits()) == 64
    assert policy.usable_context(limits(kv_capacity_tokens=39)) == 32


def test_paused_gives_way_first_then_the_lowest_class_then_the_youngest() -> None:
    urgent = sequence(1, Priority.CRITICAL, arrival=9)
    older, younger = sequence(1, arrival=1), sequence(1, arrival=2)
    low = sequence(1, Priority.LOW, arrival=0)
    assert policy.victim([urgent, older, younger, low]) is low
    assert policy.victim([urgent, younger, older]) is younger
    urgent.paused = True
    assert policy.victim([urgent, older, younger, low]) is urgent


@pytest.mark.parametrize(
    ("of", "asked", "got"),
    [
        ({}, (None, None), Ceilings(rows=4, prefill=8, grain=0, lone=False)),
        ({}, (2, None), Ceilings(rows=2, prefill=8, grain=0, lone=False)),
        ({}, (0, 0), Ceilings(rows=1, prefill=1, grain=0, lone=True)),
        ({}, (99, 99), Ceilings(rows=4, prefill=8, grain=0, lone=True)),
        ({"prefill_grain": 4}, (None, None), Ceilings(rows=4, prefill=8, grain=0, lone=False)),
        ({"prefill_grain": 4}, (3, 5), Ceilings(rows=3, prefill=5, grain=4, lone=False)),
        ({"prefill_grain": 4}, (3, 1), Ceilings(rows=3, prefill=4, grain=4, lone=False)),
        (
            {"prefill_grain": 4, "max_itl_s": 1.0},
            (None, None),
            Ceilings(rows=4, prefill=8, grain=4, lone=False),
        ),
        ({"prefill_budget": 32}, (None, 99), Ceilings(rows=4, prefill=32, grain=0, lone=True)),
        (
            {"prefill_budget": 32, "prefill_grain": 2, "max_itl_s": 1.0},
            (None, None),
            Ceilings(rows=4, prefill=32, grain=2, lone=False),
        ),
    ],
)
def test_ceilings_stay_within_what_was_loaded(of, asked, got) -> None:
    assert ceilings(limits(**{"prefill_step_size": 8, **of}), *asked) == got
