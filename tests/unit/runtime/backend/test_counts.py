"""Penalties' counts against counting anew."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_serving.runtime.backend.counts import Counts, ints

VOCAB = 8
tokens = st.lists(st.integers(0, VOCAB - 1), max_size=12)
windows = st.sampled_from([None, 1, 2, 5, 40])


def anew(
    token_ids: Sequence[int], prompt_len: int, window: int | None
) -> tuple[list[int], list[int]]:
    """Of the output and of the prompt: how often each token is among the last `window`."""
    begin = 0 if window is None else max(0, len(token_ids) - window)
    parts = token_ids[max(begin, prompt_len) :], token_ids[begin:prompt_len]
    output, prompt = ([part.count(token) for token in range(VOCAB)] for part in parts)
    return output, prompt


@settings(max_examples=60, deadline=None)
@given(
    sequences=st.lists(st.tuples(tokens, st.integers(0, 12), windows), min_size=1, max_size=4),
    drawn=st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=4, max_size=4), max_size=12),
    told=tokens,
)
def test_a_window_has_the_last_tokens(
    sequences: list[tuple[list[int], int, int | None]], drawn: list[list[int]], told: list[int]
) -> None:
    counts = Counts(VOCAB)
    counts.give_back(counts.take([1, 2], 1, 3))  # a slot that was another's
    have = [list(ids) for ids, _, _ in sequences]
    ends = [min(n, len(ids)) for ids, n, _ in sequences]
    slots = [counts.take(ids, n, w) for ids, n, (_, _, w) in zip(have, ends, sequences, strict=True)]  # fmt: skip

    def check() -> None:
        output, prompt = (np.array(table).tolist() for table in counts.tables())
        for slot, ids, end, (_, _, window) in zip(slots, have, ends, sequences, strict=True):
            assert (output[slot], prompt[slot]) == anew(ids, end, window)

    check()
    for step in drawn:
        row = step[: len(slots)]
        counts.add(slots, ints(slots), mx.array(row, dtype=mx.int32))
        for ids, token in zip(have, row, strict=True):
            ids.append(token)
        check()
    counts.append(slots[0], told)
    have[0] += told
    check()


def test_a_token_beyond_the_logits_is_not_counted() -> None:
    counts = Counts(VOCAB)
    slot = counts.take([VOCAB, 3], 2, 2)
    counts.append(slot, [4, 4])
    output, prompt = counts.tables()
    assert (output[slot].tolist(), prompt[slot].tolist()) == ([0, 0, 0, 0, 2, 0, 0, 0], [0] * VOCAB)
