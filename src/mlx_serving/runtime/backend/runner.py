"""The MLX runner: turns step plans into forward passes, without waiting for them.

A step is at most one unpadded `[1, N]` forward a prefill chunk, and one `[rows, 1]` decode forward
over the dense prefix of rows; a second one where some of them have adapters. Nothing of a step
reaches the host until `PendingStep.wait`: the token that a row sampled last is the next step's input
straight from the device, so steps can be launched several deep.

Not thread-safe. MLX binds unevaluated arrays to the thread that built them: launch, wait and reset
from one thread.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module

from mlx_serving.runtime.backend.adapters import Adapter, Adapters, Mix
from mlx_serving.runtime.backend.arch import first_lines
from mlx_serving.runtime.backend.grammar_rows import GrammarRows
from mlx_serving.runtime.backend.judge import Judge
from mlx_serving.runtime.backend.kv import KVStore
from mlx_serving.runtime.backend.pending import Forward, MLXPendingStep
from mlx_serving.runtime.backend.pooling import RowPooler
from mlx_serving.runtime.backend.sampler import Sampler
from mlx_serving.runtime.backend.tier import Copies, Tier
from mlx_serving.runtime.core.disk import DiskEvent
from mlx_serving.runtime.core.plan import (
    DecodeRow,
    Forced,
    PrefillChunk,
    RowStart,
    StepPlan,
)


class MLXRunner:
    """Implements `core.plan.Runner` for one loaded mlx-lm model.

    A row with a grammar needs a mask to draw its token, and the mask needs the token before it. So
    its draw (and that of the rows beside it in the forward) is put off until the next launch or
    this step's wait: the forward runs while the masks are computed, and steps overlap as ever.

    Where a mask leaves one token, the next masks are computed too, as long as that is so: `foresee`
    tells the scheduler, and the run is computed in one forward pass (`foresight`: whether it may).

    `backbone`: what `arch.head_on_last` returned for the model. `exact_batch`: decode always with
    `max_rows` rows, so that a row's arithmetic never depends on how many others there are. `pooler`:
    what makes a vector of a pooled sequence's hidden states. `judge`: what makes a score of its last
    logits instead. `adapters`: the model's.
    """

    def __init__(
        self,
        model: Module,
        store: KVStore,
        sampler: Sampler,
        *,
        max_rows: int,
        backbone: Module | None,
        exact_batch: bool = False,
        pooler: RowPooler | None = None,
        foresight: bool = False,
        judge: Judge | None = None,
        adapters: Adapters | None = None,
    ) -> None:
        self._model = model
        self._judge = judge
        self._backbone = backbone
        self._pooler = pooler or RowPooler()
        self._tier: Tier | None = None
        self._exact_rows = max_rows if exact_batch else 0
        self._max_rows = max_rows
        self.store = store
        self.sampler = sampler
        self._last = mx.zeros((max_rows,), mx.int32)
        """Each row's newest sampled token."""
        self._grammars = GrammarRows(foresight)
        self._undrawn: list[Forward] = []
        """Of the newest step."""
        self._adapters = adapters
        self._adapted: dict[int, Adapter] = {}
        """By row."""

    def foresee(self) -> list[Forced]:
        """Makes the draws that wait for a mask, and tells what the masks said of later ones."""
        self._settle()
        return self._grammars.foreseen()

    def launch(self, plan: StepPlan) -> MLXPendingStep:
        self._settle()
        if plan.keep_blocks is not None:
            self.store.keep_blocks(plan.keep_blocks)
        if plan.slab_tokens is not None:
            self.store.set_budget(plan.slab_tokens)
        for row in plan.frees:
            self.store.free(row)
            self.sampler.free(row)
            self._grammars.free(row)
            self._adapted.pop(row, None)
            self._pooler.free(row)
        for source, target in plan.moves:
            self._move(source, target)
        if self._tier is not None:
            self._tier.before(plan.disk)
        for start in plan.starts:
            # All first: the slabs then grow once.
            self.store.start(start.row, len(start.token_ids))
        for start in plan.starts:
            self._start(start)
        forwards: list[Forward] = []
        pooled: dict[int, mx.array] = {}
        for chunk in plan.prefill:
            if chunk.pooled:
                pooled |= self._pool(chunk)
            else:
                forwards += self._prefill(chunk)
            self._enqueue(forwards)
        for decoded in self._decode(plan.decode):
            forwards.append(decoded)
            self._enqueue(forwards)
        # Evaluated together: MLX copies an array that it updates while an evaluation holds it.
        published = [self.store.publish(p.row, p.start, p.blocks) for p in plan.publish]
        mx.async_eval(published[-1:])
        copies = None if self._tier is None else self._tier.after(plan.disk)
        slabs = self.store.arrays()
        # With forwards: the array that later launches assign to, so `wait` is for those, too, and the
        # device is idle between the loop's turns. Loads and mx.clear_cache rely on it: the latter waits
        # for MLX's thread and keeps the interpreter, which that thread may need to let go of a weight.
        effect = [self._last] if forwards else [_probe(slab) for slab in slabs[-1:]]
        mx.async_eval(effect)
        collect = partial(self._collect, copies, plan.disk.wait)
        return MLXPendingStep(plan.step_id, forwards, pooled, effect, self._settle, collect)

    def _collect(self, copies: Copies | None, wait: bool) -> Sequence[DiskEvent]:
        return () if self._tier is None else self._tier.collect(copies, wait=wait)

    def _enqueue(self, forwards: Sequence[Forward]) -> None:
        """Start computing what was built. Once for each forward pass: while an earlier one's reads
        of a slab are merely planned, a later one's write would copy the slab. The slabs are named
        because a chunk that samples nothing is reached only through them."""
        sampled = [f.draw.arrays() if f.draw is not None else f.logits for f in forwards]
        mx.async_eval(self.store.arrays(), self._last, sampled)

    def _settle(self) -> None:
        """Make the newest step's draws that were put off."""
        forwards, self._undrawn = self._undrawn, []
        for forward in forwards:
            self._draw(forward, self._grammars.masks(forward))
        if forwards:
            self._enqueue(forwards)

    def _draw(self, forward: Forward, masks: dict[int, bytes] | None = None) -> None:
        logits, forward.logits = forward.logits, None
        assert logits is not None
        draw = forward.draw = self.sampler.sample(logits, forward.rows, forward.positions, masks)
        self._keep(draw.tokens, forward.rows)
        self._grammars.drew(forward)

    def _sampled(self, forward: Forward) -> Forward:
        if self._grammars.among(forward.rows):
            self._undrawn.append(forward)
        else:
            self._draw(forward)
        return forward

    def keep_on(self, tier: Tier) -> None:
        """From now on plans may order blocks to and from disk."""
        self._tier = tier

    def close(self) -> None:
        if self._tier is not None:
            self._tier.close()

    def reset(self) -> None:
        if self._tier is not None:
            self._tier.reset()
        self.store.reset()
        self.sampler.reset()
        self._grammars.reset()
        self._undrawn.clear()
        self._adapted.clear()
        self._pooler.reset()
        self._last = mx.zeros((self._max_rows,), mx.int32)

    def forward_row(
        self, row: int, tokens: mx.array, start: int, embeddings: mx.array | None = None
    ) -> mx.array:
        """Logits `[1, vocabulary]` after `tokens [1, N]` at positions from `start` on.

        `embeddings [1, N, hidden]` replace the tokens' own, where the model takes them.
        """
        caches = self.store.row_view(row, start, tokens.shape[1])
        with self._with_adapter(row):
            return self._forward(tokens, caches, embeddings)

    def _with_adapter(self, row: int) -> AbstractContextManager[None]:
        adapter = self._adapted.get(row)
        if adapter is None:
            return nullcontext()
        assert self._adapters is not None
        return self._adapters.on(adapter)

    def _start(self, start: RowStart) -> None:
        if start.blocks:
            self.store.copy_blocks(start.row, start.blocks)
            assert self.store.length(start.row) == start.reused
            # Now, so that no copy still reads the pool when blocks are next published.
            self._enqueue(())
        self.sampler.start(start)
        self._grammars.start(start)
        if start.adapter is not None:
            assert self._adapters is not None
            self._adapted[start.row] = self._adapters[start.adapter]

    def _move(self, source: int, target: int) -> None:
        self.store.move(source, target)
        self.sampler.move(source, target)
        self._last[target] = self._last[source]
        self._pooler.move(source, target)
        self._grammars.move(source, target)
        if source in self._adapted:
            self._adapted[target] = self._adapted.pop(source)

    def _prefill(self, chunk: PrefillChunk) -> list[Forward]:
        logits = self.forward_row(chunk.row, mx.array([chunk.token_ids]), chunk.start)
        if not chunk.samples:
            return []
        position = chunk.start + len(chunk.token_ids)
        return [self._sampled(Forward(logits, [chunk.row], [chunk.seq_id], [position]))]

    def _pool(self, chunk: PrefillChunk) -> dict[int, mx.array]:
        """The vector by seq_id once the chunk reaches the text's end. Started at once, as its slabs
        are: a chunk before the end is reached through its row's state."""
        tokens = mx.array([chunk.token_ids])
        if self._judge is not None:
            score = self._judge(self.forward_row(chunk.row, tokens, chunk.start))
            mx.async_eval(score)
            return {chunk.seq_id: score} if chunk.samples else {}
        assert self._backbone is not None, (
            "a model without hidden states is never asked for a vector"
        )
        caches = self.store.row_view(chunk.row, chunk.start, tokens.shape[1])
        hidden = self._backbone.hidden(tokens, cache=caches)[0]
        state = self._pooler.add(chunk.row, hidden, chunk.start, ends=chunk.samples)
        mx.async_eval(state)
        return {chunk.seq_id: state} if chunk.samples else {}

    def _decode(self, rows: Sequence[DecodeRow]) -> Iterator[Forward]:
        """Each is to be enqueued before the next is built."""
        for row in rows:
            self.sampler.count(row.row, row.forced)
        # A first position has no state to batch with: its recurrent state begins here.
        for row in rows:
            if row.position == 0:
                yield from self._decode_first(row)
        for group in self._groups([row for row in rows if row.position > 0]):
            yield from self._decode_group(group)

    def _decode_group(self, rows: Sequence[DecodeRow]) -> Iterator[Forward]:
        if not self.store.ragged or self._exact_rows:
            yield from (self._decode_alone(row) for row in rows if row.forced)
            rows = [row for row in rows if not row.forced]
        if rows and (self._exact_rows or (len(rows) > 1 and self.store.batched)):
            yield self._decode_batch(rows)
        else:
            yield from map(self._decode_alone, rows)

    def _groups(self, rows: Sequence[DecodeRow]) -> list[list[DecodeRow]]:
        """Rows that are lines of one forward pass: those of the model itself, those of adapters that mix,
        and those of each adapter that does not."""
        if not self._adapted:
            return [list(rows)] if rows else []
        groups: dict[str | None, list[DecodeRow]] = {}
        for row in rows:
            adapter = self._adapted.get(row.row)
            kind = None if adapter is None else "mixed" if adapter.mixes else adapter.tag
            groups.setdefault(kind, []).append(row)
        return list(groups.values())

    def _decode_first(self, row: DecodeRow) -> list[Forward]:
        assert row.token_id is not None
        chunk = PrefillChunk(row.row, row.seq_id, (row.token_id,), 0, samples=True)
        return self._prefill(chunk)

    def _decode_alone(self, row: DecodeRow) -> Forward:
        if row.token_id is None:
            token = self._last[row.row : row.row + 1]
        else:
            token = mx.array([row.token_id, *row.forced], dtype=mx.int32)
        logits = self.forward_row(row.row, token[None], row.position)
        return self._sampled(Forward(logits, [row.row], [row.seq_id], [row.last + 1]))

    def _decode_batch(self, rows: Sequence[DecodeRow]) -> Forward:
        lines = max(self._exact_rows, rows[-1].row + 1)
        assert all(a.row < b.row for a, b in itertools.pairwise(rows)), rows
        tokens = self._inputs(rows, lines)
        ahead = {row.row: len(row.forced) for row in rows if row.forced}
        caches = self.store.batch_view({row.row: row.position for row in rows}, lines, ahead)
        with (
            self._with_adapters(rows, lines),
            first_lines(self._backbone, lines if ahead else None),
        ):
            logits = self._forward(tokens[:, None], caches)[:lines]
        at: list[int | None] = [None] * lines
        seq_ids: list[int | None] = [None] * lines
        positions = [0] * lines
        for row in rows:
            at[row.row] = row.row
            seq_ids[row.row] = row.seq_id
            positions[row.row] = row.last + 1
        return self._sampled(Forward(logits, at, seq_ids, positions))

    def _with_adapters(self, rows: Sequence[DecodeRow], lines: int) -> AbstractContextManager[None]:
        """Of rows that are decoded together, each on its line and on those behind `lines` that hold its
        forced tokens, as `_inputs` has them."""
        at: dict[str, list[int]] = {}
        behind = lines
        for row in rows:
            if (adapter := self._adapted.get(row.row)) is not None:
                forced = range(behind, behind + len(row.forced))
                at.setdefault(adapter.tag, []).extend((row.row, *forced))
            behind += len(row.forced)
        if not at:
            return nullcontext()
        assert self._adapters is not None
        of = {adapter.tag: adapter for adapter in self._adapted.values()}
        if len(at) == 1:
            # Nobody's lines may have it too.
            return self._adapters.on(of[next(iter(at))])
        return self._adapters.on(Mix([(of[tag], own) for tag, own in at.items()], behind))

    def _inputs(self, rows: Sequence[DecodeRow], lines: int) -> mx.array:
        """The last token of each line's row and, behind them, those before it that are computed too."""
        tokens = self._last[:lines]
        known = {row.row: (row.token_id, *row.forced) for row in rows if row.token_id is not None}
        if known:
            index = mx.array(list(known), dtype=mx.int32)
            tokens[index] = mx.array([run[-1] for run in known.values()], dtype=mx.int32)
        before = [token for run in known.values() for token in run[:-1]]
        if before:
            tokens = mx.concatenate([tokens, mx.array(before, dtype=mx.int32)])
        return tokens

    def _keep(self, tokens: mx.array, rows: Sequence[int | None]) -> None:
        """Remember what was drawn: line by line of one row, or of the first rows."""
        lines = len(rows)
        first = rows[0] if lines == 1 and rows[0] is not None else 0
        if None in rows:
            active = mx.array([row is not None for row in rows])
            tokens = mx.where(active, tokens, self._last[:lines])
        if lines == self._max_rows:
            # A new object: item assignment must not reach the tokens that a pending step holds.
            self._last = mx.array(tokens)
        else:
            self._last[first : first + lines] = tokens

    def _forward(
        self, tokens: mx.array, caches: list[Any], embeddings: mx.array | None = None
    ) -> mx.array:
        if embeddings is None:
            logits = self._model(tokens, cache=caches)
        else:
            logits = self._model(tokens, cache=caches, input_embeddings=embeddings)
        assert self._backbone is None or logits.shape[1] == 1
        return logits[:, -1]


def _probe(slab: mx.array) -> mx.array:
    """One element of a slab in a buffer of its own: to wait for the slab without holding it."""
    return slab[(slice(0, 1),) * slab.ndim] + 0
