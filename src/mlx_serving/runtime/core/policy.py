"""Decisions as pure functions: how a prefill is cut, who fits, who gives way."""

from __future__ import annotations

from collections.abc import Iterable

from mlx_serving.runtime.core.plan import Limits
from mlx_serving.runtime.core.rows import rectangle
from mlx_serving.runtime.core.sequence import Sequence


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


def fits(sequences: Iterable[Sequence], limits: Limits, *, ahead: int = 0) -> bool:
    """Whether these sequences' rows fit the KV memory once each is `ahead` tokens longer."""
    count = longest = 0
    for seq in sequences:
        count += 1
        length = seq.reach(ahead)
        if length > longest:
            longest = length
    return rectangle(count, longest, limits.kv_bucket_tokens) <= limits.kv_capacity_tokens


def victim(running: Iterable[Sequence]) -> Sequence:
    """Who gives its row up: one whose reader is slow loses nothing by it; else the lowest class's
    youngest. The first in order is never chosen before all others, so somebody always advances."""
    return max(running, key=lambda seq: (seq.paused, seq.order))
