"""The one quantity and the ends of a sequence."""

from __future__ import annotations

from mlx_serving.runtime.core.sequence import Sequence
from mlx_serving.types import SamplingParams


def sequence(context: int = 100, eos: tuple[int, ...] = (7,), **sampling: object) -> Sequence:
    params = SamplingParams(**({"max_tokens": 5} | sampling))
    seq = Sequence(seq_id=1, tokens=[1, 2, 3], prompt_len=3, sampling=params)
    seq.bind(0, context, eos)
    return seq


def ends(seq: Sequence, token: int) -> str | None:
    seq.inflight += 1
    return seq.absorb(token)


def test_wanted_counts_what_is_in_flight() -> None:
    seq = sequence()
    seq.inflight = 2
    assert seq.wanted == 5
    assert seq.absorb(9) is None
    assert (seq.wanted, seq.inflight, seq.tokens[-1]) == (5, 1, 9)


def test_end_of_sequence_stops_unless_ignored() -> None:
    assert ends(sequence(), 7) == "stop"
    assert ends(sequence(ignore_eos=True), 7) is None
    assert ends(sequence(ignore_eos=True, stop_token_ids=(7,)), 7) == "stop"
    assert ends(sequence(stop_token_ids=(8,)), 8) == "stop"


def test_a_stop_at_the_last_token_is_a_stop() -> None:
    assert ends(sequence(max_tokens=1), 7) == "stop"
    assert ends(sequence(max_tokens=1), 9) == "length"


def test_the_context_ends_it_like_max_tokens() -> None:
    seq = sequence(context=5, max_tokens=50)
    assert ends(seq, 9) is None
    assert ends(seq, 9) == "length"


def test_the_last_token_needs_no_kv() -> None:
    seq = sequence(max_tokens=2)
    assert (seq.reach(), seq.reach(1), seq.reach(100)) == (3, 4, 4)
