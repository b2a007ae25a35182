"""The sampler's choice as one native operation: the same tokens as `sampler.Sampler`, its oracle.

One pass or a few over a row's logits, a row a thread, instead of an MLX operation over the whole
batch for every step of every filter. Log-probabilities stay MLX's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx
import numpy as np

from mlx_serving.runtime.backend.sampler import MIN_TEMPERATURE, Batch, RowState, Sampler
from mlx_serving.runtime.native import ops


class NativeSampler(Sampler):
    """`Sampler` over the native kernels, for MLX's CPU backend."""

    def _describe(self, rows: tuple[int | None, ...]) -> Batch:
        batch = super()._describe(rows)
        states = [None if row is None else self._rows[row] for row in rows]
        bias = ban = -1
        lines: list[ops.SampleLine] = []
        for state in states:
            if state is None:
                lines.append(ops.SampleLine())
                continue
            bias += state.bias is not None
            ban += state.ban is not None
            lines.append(_line(state, bias, ban))
        batch.native = ops.sample_lines(lines)
        return batch

    def _tokens(
        self,
        raw: mx.array,
        batch: Batch,
        positions: Sequence[int],
        masks: Mapping[int, bytes] | None,
    ) -> mx.array:
        output, prompt = self._counts.tables() if batch.penalty is not None else (None, None)
        return ops.sample(
            raw,
            batch.native,
            positions,
            allowed=_allowed(raw.shape, masks) if masks else None,
            bias=None if batch.bias is None else batch.bias[1],
            ban=None if batch.ban is None else batch.ban[1],
            output=output,
            prompt=prompt,
        )


def _line(state: RowState, bias: int, ban: int) -> ops.SampleLine:
    """`bias` and `ban` are the newest rows of the batch's tables: the line's own, if it has any."""
    p = state.params
    return ops.SampleLine(
        temperature=max(p.temperature, MIN_TEMPERATURE) if p.temperature > 0 else 0.0,
        top_k=p.top_k,
        top_p=min(p.top_p, 1.0),
        log_min_p=float(np.log(p.min_p)) if p.min_p > 0 else -np.inf,
        key0=state.key[0],
        key1=state.key[1],
        bias=bias if state.bias is not None else -1,
        counts=-1 if state.count_slot is None else state.count_slot,
        ban=ban if state.ban is not None else -1,
        repetition=p.repetition_penalty,
        presence=p.presence_penalty,
        frequency=p.frequency_penalty,
        ban_until=state.prompt_len + p.min_tokens,
    )


def _allowed(shape: tuple[int, ...], masks: Mapping[int, bytes]) -> mx.array:
    lines, vocab = shape
    width = -(-vocab // 8)
    allowed = np.full((lines, width), 0xFF, np.uint8)
    for line, mask in masks.items():
        allowed[line] = np.frombuffer(mask, np.uint8, width)
    return mx.array(allowed)
