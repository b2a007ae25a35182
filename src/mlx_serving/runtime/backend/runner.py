"""The MLX runner: turns step plans into forward passes, without waiting for them.

A step is at most one unpadded `[1, N]` forward a prefill chunk, and one `[rows, 1]` decode forward
over the dense prefix of rows. Nothing of a step reaches the host until `PendingStep.wait`: the
token that a row sampled last is the next step's input straight from the device, so steps can be
launched several deep.

Not thread-safe. MLX binds unevaluated arrays to the thread that built them: launch, wait and reset
from one thread.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module

from mlx_serving.runtime.backend.kv import KVStore
from mlx_serving.runtime.backend.sampler import Draw, Sampler
from mlx_serving.runtime.core.plan import (
    DecodeRow,
    PrefillChunk,
    RowStart,
    Sampled,
    StepPlan,
    StepResult,
)


@dataclass(slots=True)
class _Sampling:
    """A draw and whose it is: sequence ids by line, None where nobody wants the token."""

    seq_ids: list[int | None]
    draw: Draw

    def result(self) -> list[Sampled]:
        tokens: list[int] = np.array(self.draw.tokens).tolist()
        logprobs = self.draw.logprobs()
        return [
            Sampled(seq_id, [tokens[i]], [logprobs[i]] if i in logprobs else None)
            for i, seq_id in enumerate(self.seq_ids)
            if seq_id is not None
        ]


class MLXPendingStep:
    """A launched step. `wait` blocks on its tokens only, not on steps launched after it."""

    def __init__(self, step_id: int, samplings: list[_Sampling], effect: mx.array) -> None:
        self._step_id = step_id
        self._samplings = samplings
        self._effect = effect
        """Stands for the step where nothing was sampled."""

    def wait(self) -> StepResult:
        mx.eval(self._effect, [s.draw.arrays() for s in self._samplings])
        sampled = [one for sampling in self._samplings for one in sampling.result()]
        return StepResult(self._step_id, sampled)


class MLXRunner:
    """Implements `core.plan.Runner` for one loaded mlx-lm model.

    `head_on_last`: the model returns the last position's logits only. `exact_batch`: decode always
    with `max_rows` rows, so that a row's arithmetic never depends on how many others there are.
    """

    def __init__(
        self,
        model: Module,
        store: KVStore,
        sampler: Sampler,
        *,
        max_rows: int,
        head_on_last: bool,
        exact_batch: bool = False,
    ) -> None:
        self._model = model
        self._head_on_last = head_on_last
        self._exact_rows = max_rows if exact_batch else 0
        self._max_rows = max_rows
        self.store = store
        self.sampler = sampler
        self._last = mx.zeros((max_rows,), mx.int32)
        """Each row's newest sampled token."""

    def launch(self, plan: StepPlan) -> MLXPendingStep:
        for row in plan.frees:
            self.store.free(row)
            self.sampler.free(row)
        for source, target in plan.moves:
            self._move(source, target)
        for start in plan.starts:
            self._start(start)
        samplings: list[_Sampling] = []
        for chunk in plan.prefill:
            samplings += self._prefill(chunk)
            self._enqueue(samplings)
        if plan.decode:
            samplings += self._decode(plan.decode)
            self._enqueue(samplings)
        slabs = self.store.arrays()
        effect = _probe(slabs[-1]) if slabs and not samplings else self._last
        mx.async_eval(effect)
        return MLXPendingStep(plan.step_id, samplings, effect)

    def _enqueue(self, samplings: Sequence[_Sampling]) -> None:
        """Start computing what was built. Once for each forward pass: while an earlier one's reads
        of a slab are merely planned, a later one's write would copy the slab. The slabs are named
        because a chunk that samples nothing is reached only through them."""
        mx.async_eval(self.store.arrays(), self._last, [s.draw.arrays() for s in samplings])

    def reset(self) -> None:
        self.store.reset()
        self.sampler.reset()
        self._last = mx.zeros((self._max_rows,), mx.int32)

    def forward_row(
        self, row: int, tokens: mx.array, start: int, embeddings: mx.array | None = None
    ) -> mx.array:
        """Logits `[1, vocabulary]` after `tokens [1, N]` at positions from `start` on.

        `embeddings [1, N, hidden]` replace the tokens' own, where the model takes them.
        """
        caches = self.store.row_view(row, start, tokens.shape[1])
        return self._forward(tokens, caches, embeddings)

    def _start(self, start: RowStart) -> None:
        self.store.start(start.row, len(start.token_ids))
        self.sampler.start(start)

    def _move(self, source: int, target: int) -> None:
        self.store.move(source, target)
        self.sampler.move(source, target)
        self._last[target] = self._last[source]

    def _prefill(self, chunk: PrefillChunk) -> list[_Sampling]:
        logits = self.forward_row(chunk.row, mx.array([chunk.token_ids]), chunk.start)
        if not chunk.samples:
            return []
        position = chunk.start + len(chunk.token_ids)
        draw = self.sampler.sample(logits, (chunk.row,), (position,))
        self._last[chunk.row] = draw.tokens[0]
        return [_Sampling([chunk.seq_id], draw)]

    def _decode(self, rows: Sequence[DecodeRow]) -> list[_Sampling]:
        # A first position has no state to batch with: its recurrent state begins here.
        first = [row for row in rows if row.position == 0]
        rest = [row for row in rows if row.position > 0]
        samplings = [s for row in first for s in self._decode_first(row)]
        if not rest:
            return samplings
        if not self._exact_rows and (len(rest) == 1 or not self.store.batched):
            return samplings + [self._decode_alone(row) for row in rest]
        return [*samplings, self._decode_batch(rest)]

    def _decode_first(self, row: DecodeRow) -> list[_Sampling]:
        assert row.token_id is not None
        chunk = PrefillChunk(row.row, row.seq_id, (row.token_id,), 0, samples=True)
        return self._prefill(chunk)

    def _decode_alone(self, row: DecodeRow) -> _Sampling:
        if row.token_id is None:
            token = self._last[row.row : row.row + 1]
        else:
            token = mx.array([row.token_id], dtype=mx.int32)
        logits = self.forward_row(row.row, token[None], row.position)
        draw = self.sampler.sample(logits, (row.row,), (row.position + 1,))
        self._keep(draw.tokens, row.row)
        return _Sampling([row.seq_id], draw)

    def _decode_batch(self, rows: Sequence[DecodeRow]) -> _Sampling:
        lines = max(self._exact_rows, rows[-1].row + 1)
        assert all(a.row < b.row for a, b in itertools.pairwise(rows)), rows
        tokens = self._inputs(rows, lines)
        caches = self.store.batch_view({row.row: row.position for row in rows}, lines)
        logits = self._forward(tokens[:, None], caches)
        at: list[int | None] = [None] * lines
        seq_ids: list[int | None] = [None] * lines
        positions = [0] * lines
        for row in rows:
            at[row.row] = row.row
            seq_ids[row.row] = row.seq_id
            positions[row.row] = row.position + 1
        draw = self.sampler.sample(logits, at, positions)
        if len(rows) == lines:
            self._keep(draw.tokens, 0)
        else:
            active = mx.array([row is not None for row in at])
            self._keep(mx.where(active, draw.tokens, self._last[:lines]), 0)
        return _Sampling(seq_ids, draw)

    def _inputs(self, rows: Sequence[DecodeRow], lines: int) -> mx.array:
        tokens = self._last[:lines]
        given = {row.row: row.token_id for row in rows if row.token_id is not None}
        if given:
            index = mx.array(list(given), dtype=mx.int32)
            tokens[index] = mx.array(list(given.values()), dtype=mx.int32)
        return tokens

    def _keep(self, tokens: mx.array, row: int) -> None:
        if tokens.shape[0] == self._max_rows:
            # A new object: item assignment must not reach the tokens that a pending step holds.
            self._last = mx.array(tokens)
        else:
            self._last[row : row + tokens.shape[0]] = tokens

    def _forward(
        self, tokens: mx.array, caches: list[Any], embeddings: mx.array | None = None
    ) -> mx.array:
        if embeddings is None:
            logits = self._model(tokens, cache=caches)
        else:
            logits = self._model(tokens, cache=caches, input_embeddings=embeddings)
        assert self._head_on_last is False or logits.shape[1] == 1
        return logits[:, -1]


def _probe(slab: mx.array) -> mx.array:
    """One element of a slab in a buffer of its own: to wait for the slab without holding it."""
    return slab[(slice(0, 1),) * slab.ndim] + 0
