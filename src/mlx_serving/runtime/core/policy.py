"""Decisions as pure functions: how a prefill is cut, who fits, who goes first and who gives way."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mlx_serving.runtime.core.plan import Limits
from mlx_serving.runtime.core.rows import held
from mlx_serving.runtime.core.sequence import Sequence
from mlx_serving.types import Priority


def usable_context(limits: Limits) -> int:
    """Tokens that one sequence may have: the model's context, or less where memory holds less."""
    bucket = limits.kv_bucket_tokens
    return min(limits.context_length, limits.kv_capacity_tokens // bucket * bucket)


def chunk_length(
    computed: int, wanted: int, step_size: int, budget: int | None = None, grain: int = 0
) -> int:
    """Next prefill chunk: up to the next multiple of `step_size` from position 0, so that the
    cuts depend on the sequence alone and never on its neighbours. 0: it exceeds the budget.

    With a `grain` a chunk that exceeds the budget ends at an earlier multiple of it, if it can."""
    length = min(wanted, (computed // step_size + 1) * step_size) - computed
    if budget is None or length <= budget:
        return length
    return max(0, (computed + budget) // grain * grain - computed) if grain else 0


@dataclass(frozen=True, slots=True)
class Ceilings:
    """How much is taken on at once, within what the model was loaded for."""

    rows: int
    """Sequences that have a row. Those that have one when this falls keep it to their end."""
    prefill: int
    """Tokens of prefill in a step."""
    grain: int
    """Chunks may end at multiples of this, to keep to `prefill`; 0: they stay whole."""
    lone: bool
    """A chunk that is longer than `prefill` has a step to itself."""


def ceilings(limits: Limits, rows: int | None = None, prefill: int | None = None) -> Ceilings:
    """At most so many, as far as that may be; None: as loaded."""
    most = limits.prefill_budget or limits.prefill_step_size
    grain = limits.prefill_grain if limits.max_itl_s or prefill is not None else 0
    return Ceilings(
        rows=limits.max_num_seqs if rows is None else max(1, min(rows, limits.max_num_seqs)),
        prefill=most if prefill is None else max(grain, 1, min(prefill, most)),
        grain=grain,
        lone=not grain and (limits.prefill_budget is not None or prefill is not None),
    )


def fits(
    sequences: Iterable[Sequence], limits: Limits, *, ahead: int = 0, room_tokens: int | None = None
) -> bool:
    """Whether these sequences' rows fit the KV memory once each is `ahead` tokens longer."""
    room = limits.kv_capacity_tokens if room_tokens is None else room_tokens
    return row_tokens(sequences, limits, ahead=ahead) <= room


def row_tokens(sequences: Iterable[Sequence], limits: Limits, *, ahead: int = 0) -> int:
    """KV tokens that their rows take once each is `ahead` tokens longer."""
    lengths = [seq.reach(ahead) for seq in sequences]
    return held(lengths, limits.kv_bucket_tokens, own=limits.kv_own_rows)


def victim(running: Iterable[Sequence]) -> Sequence:
    """Who gives its row up: one whose reader is slow loses nothing by it; else the lowest class's
    youngest. The first in order is never chosen before all others, so somebody always advances."""
    return max(running, key=lambda seq: (seq.paused, seq.order))


def yields(running: Sequence, seq: Sequence) -> bool:
    """Whether a running sequence gives its row up to a waiting one, should there be no other: if its
    reader is slow, or if it is two classes lower. Who had waited too long, or joins in this very step,
    keeps its row."""
    if running.row is None or running.paused:
        return running.row is not None
    return not running.promoted and running.priority >= seq.priority + 2


LANE_SHARE = 8
"""One row in so many may be held by those who had waited too long."""


def lane_rows(rows: int) -> int:
    return max(1, rows // LANE_SHARE)


SHORT_JOB_S_PER_TOKEN = 0.01
SHORT_JOB_MAX_S = 10.0


def rank(seq: Sequence, limits: Limits) -> float:
    """Who goes first among one client's sequences of one class: by arrival or, where short jobs are
    preferred, as if each token of the expected answer were a later arrival, up to a bound."""
    expected = seq.turn.expected_tokens
    if not limits.short_jobs_first:
        return seq.arrived_s
    late_s = SHORT_JOB_MAX_S if expected is None else expected * SHORT_JOB_S_PER_TOKEN
    return seq.arrived_s + min(SHORT_JOB_MAX_S, late_s)


def blend(average: float, sample: float) -> float:
    """A moving average of about ten samples; 0: there was none."""
    return sample if not average else 0.9 * average + 0.1 * sample


def too_late(seq: Sequence, reused: int, now_s: float, step_s: float, limits: Limits) -> bool:
    """Whether a sequence that has not begun will not end by its deadline: its prompt's chunks, and the
    tokens that it generates at least, take a step each. `step_s`: the present pace; 0: not known."""
    deadline_s = seq.turn.deadline_s
    if deadline_s is None or seq.admitted_s is not None or len(seq.tokens) > seq.prompt_len:
        return False
    sampling = seq.sampling
    endless = sampling.ignore_eos and not sampling.stop_token_ids
    least = sampling.max_tokens if endless else max(1, sampling.min_tokens)
    chunks = -(-(seq.prompt_len - reused) // limits.prefill_step_size)
    return now_s + (chunks + least - 1) * step_s > deadline_s


def stands_aside(seq: Sequence, urgent: Priority, now_s: float, limits: Limits) -> bool:
    """Whether a sequence computes nothing in a step, for the sake of the most urgent prompt in it: beside
    a critical one only critical ones do, and those that waited too long or have been there so long."""
    if urgent is not Priority.CRITICAL or seq.priority is Priority.CRITICAL or seq.promoted:
        return False
    return now_s - seq.arrived_s < limits.max_wait_s
