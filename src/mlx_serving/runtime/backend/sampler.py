"""Sampling over the rows of a batch.

Greedy rows pay for an argmax and nothing else; edits, filters and log-probabilities are computed
for the rows that ask. Which arrays describe a set of rows is worked out once for each set, not
each step. No row's token depends on its neighbours: every operation works row by row at a width
that the row's own parameters fix, and what a row did not ask for changes no bit of it.

Filters are thresholds on the scaled logits, so ties are kept together: top-k keeps every token as
likely as the k-th, top-p every token as likely as the last of the smallest set that reaches p.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_serving.runtime.backend.counts import Counts, ints
from mlx_serving.runtime.core.plan import RowStart
from mlx_serving.types import MAX_LOGPROBS, SamplingParams, TokenLogprob

TOP_P_STEPS = 26
"""Halvings of the top-p threshold over [0, TOP_P_RANGE] below the maximum: to 1e-6 in the log."""
TOP_P_RANGE = 64.0
TOP_K_WIDTHS = (64, 1024)
"""A row's k-th largest logit is looked for among this many, the same for all its batches."""

MIN_TEMPERATURE = 1e-6
"""Below it a draw is the argmax anyway; dividing by less would overflow."""
MAX_CACHED_BATCHES = 64

_MASK64 = (1 << 64) - 1


def _mix(x: int) -> int:
    """splitmix64's finaliser."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def base_key(seed: int, choice: int) -> tuple[int, int]:
    """Two 32-bit words for (seed, choice); the position is mixed into the second on the device."""
    word = _mix(_mix(seed & _MASK64) ^ choice)
    return word >> 32, word & 0xFFFFFFFF


@dataclass(slots=True)
class RowState:
    params: SamplingParams
    prompt_len: int
    key: tuple[int, int]
    bias: mx.array | None
    ban: mx.array | None
    """-inf at the tokens that may not end the sequence yet, 0 elsewhere."""
    count_slot: int | None


@dataclass(slots=True)
class Batch:
    """What the sampler knows of one set of rows."""

    bias: tuple[mx.array, mx.array] | None = None
    ban: tuple[mx.array, mx.array, mx.array] | None = None
    penalty: _Penalty | None = None
    draw: _Draw | None = None
    logprobs: list[tuple[int, int]] = field(default_factory=list)
    """(index in the batch, top k) of the rows that want log-probabilities."""
    logprob_rows: mx.array | None = None
    native: Any = None
    """The same for the native kernel: see `native_sampler`."""


@dataclass(slots=True)
class _Penalty:
    rows: mx.array
    slot_ids: tuple[int, ...]
    slots: mx.array
    """The same on the device."""
    repetition: mx.array
    presence: mx.array
    frequency: mx.array


@dataclass(slots=True)
class _Draw:
    """Rows with a temperature, in the order of the batch, and which of them filter."""

    rows: mx.array
    all_rows: bool
    keys: mx.array
    temperature: mx.array
    top_k: list[tuple[int, mx.array, mx.array]]
    """(width, indices among the drawing rows, k)."""
    top_p: tuple[mx.array, mx.array] | None
    log_min_p: mx.array | None


@dataclass(slots=True)
class Draw:
    """One forward pass's samples, on the device."""

    tokens: mx.array
    """[rows] int32."""
    wanted: list[tuple[int, int]]
    chosen: mx.array | None = None
    top_ids: mx.array | None = None
    top_logprobs: mx.array | None = None

    def arrays(self) -> list[mx.array]:
        extra = (self.chosen, self.top_ids, self.top_logprobs)
        return [self.tokens, *(a for a in extra if a is not None)]

    def logprobs(self) -> dict[int, TokenLogprob]:
        """By index in the batch, for the rows that asked."""
        if self.chosen is None:
            return {}
        chosen: list[float] = np.array(self.chosen).tolist()
        if self.top_ids is None or self.top_logprobs is None:
            return {i: TokenLogprob(c) for (i, _), c in zip(self.wanted, chosen, strict=True)}
        ids, values = np.array(self.top_ids), np.array(self.top_logprobs)
        order = np.lexsort((ids, -values), axis=-1)
        top_ids = np.take_along_axis(ids, order, axis=-1).tolist()
        top_values = np.take_along_axis(values, order, axis=-1).tolist()
        return {
            i: TokenLogprob(c, tuple(t[:k]), tuple(v[:k]))
            for (i, k), c, t, v in zip(self.wanted, chosen, top_ids, top_values, strict=True)
        }


class Sampler:
    """Draws tokens for rows that were described by `start`.

    `eos_token_ids` cannot be drawn while a row is short of its `min_tokens`.
    """

    def __init__(self, vocab_size: int, eos_token_ids: Sequence[int], max_rows: int) -> None:
        self._vocab = vocab_size
        self._eos = tuple(eos_token_ids)
        self._rows: list[RowState | None] = [None] * max_rows
        self._counts = Counts(vocab_size)
        self._batches: dict[tuple[int | None, ...], Batch] = {}

    def start(self, start: RowStart) -> None:
        self.free(start.row)
        params = start.sampling
        ban = None
        if params.min_tokens > len(start.token_ids) - start.prompt_len:
            stops = set(params.stop_token_ids)
            if not params.ignore_eos:
                stops.update(self._eos)
            ban = self._dense(dict.fromkeys(stops, -np.inf)) if stops else None
        slot = None
        if _penalises(params):
            slot = self._counts.take(start.token_ids, start.prompt_len, params.penalty_window)
        self._rows[start.row] = RowState(
            params=params,
            prompt_len=start.prompt_len,
            key=base_key(params.seed, params.choice),
            bias=self._dense(params.logit_bias) if params.logit_bias else None,
            ban=ban,
            count_slot=slot,
        )

    def count(self, row: int, token_ids: Sequence[int]) -> None:
        """The row's sequence has got these without a draw."""
        state = self._rows[row]
        if token_ids and state is not None and state.count_slot is not None:
            self._counts.append(state.count_slot, token_ids)

    def free(self, row: int) -> None:
        state, self._rows[row] = self._rows[row], None
        if state is not None and state.count_slot is not None:
            self._counts.give_back(state.count_slot)
        self._batches.clear()

    def move(self, source: int, target: int) -> None:
        self.free(target)
        self._rows[target], self._rows[source] = self._rows[source], None

    def reset(self) -> None:
        for row in range(len(self._rows)):
            self.free(row)

    def sample(
        self,
        logits: mx.array,
        rows: Sequence[int | None],
        positions: Sequence[int],
        masks: Mapping[int, bytes] | None = None,
    ) -> Draw:
        """Choose a token for each line of `logits [n, vocabulary]`.

        `rows` names the row of each line, None for a line whose token nobody wants. `positions`
        are those that the tokens will have; they key the random numbers. `masks` say, by line, what
        a grammar allows (see `plan.Matcher.mask`); it comes before everything else.
        """
        key = tuple(rows)
        batch = self._batches.get(key)
        if batch is None:
            if len(self._batches) >= MAX_CACHED_BATCHES:
                self._batches.clear()
            batch = self._batches[key] = self._describe(key)
        raw = logits.astype(mx.float32)
        tokens = self._tokens(raw, batch, positions, masks)
        if batch.penalty is not None:
            penalty = batch.penalty
            self._counts.add(penalty.slot_ids, penalty.slots, tokens[penalty.rows])
        draw = Draw(tokens, batch.logprobs)
        if batch.logprob_rows is not None:
            _log_probabilities(draw, raw, batch.logprob_rows)
        return draw

    def _tokens(
        self,
        raw: mx.array,
        batch: Batch,
        positions: Sequence[int],
        masks: Mapping[int, bytes] | None,
    ) -> mx.array:
        """[lines] int32: what `sample` chooses from float32 logits."""
        edited = self._edit(_allow(raw, masks) if masks else raw, batch, positions)
        return self._choose(edited, batch, positions)

    def _edit(self, x: mx.array, batch: Batch, positions: Sequence[int]) -> mx.array:
        if batch.bias is not None:
            rows, bias = batch.bias
            x = x.at[rows].add(bias)
        if batch.penalty is not None:
            p = batch.penalty
            x = _put(x, p.rows, _penalise(x[p.rows], *self._counts.tables(), p))
        if batch.ban is not None:
            rows, ban, until = batch.ban
            banned = mx.array(list(positions), dtype=mx.int32)[rows] < until
            rest = mx.where(banned[:, None], x[rows] + ban, x[rows])
            # Where a grammar leaves nothing but the end, `min_tokens` gives way.
            some = mx.max(rest, axis=-1, keepdims=True) > -mx.inf
            x = _put(x, rows, mx.where(some, rest, x[rows]))
        return x

    def _choose(self, x: mx.array, batch: Batch, positions: Sequence[int]) -> mx.array:
        draw = batch.draw
        if draw is None:
            return mx.argmax(x, axis=-1).astype(mx.int32)
        at = mx.array(list(positions), dtype=mx.uint32)
        if draw.all_rows:
            return _draw(x, at, draw)
        tokens = mx.argmax(x, axis=-1).astype(mx.int32)
        return _put(tokens, draw.rows, _draw(x[draw.rows], at[draw.rows], draw))

    def _describe(self, rows: tuple[int | None, ...]) -> Batch:
        states: list[tuple[int, RowState]] = []
        for index, row in enumerate(rows):
            if row is not None:
                state = self._rows[row]
                assert state is not None, f"row {row} was not started"
                states.append((index, state))
        batch = Batch()
        bias = [(i, s.bias) for i, s in states if s.bias is not None]
        if bias:
            batch.bias = ints(i for i, _ in bias), mx.stack([b for _, b in bias])
        bans = [
            (i, s.ban, s.prompt_len + s.params.min_tokens) for i, s in states if s.ban is not None
        ]
        if bans:
            batch.ban = (
                ints(i for i, _, _ in bans),
                mx.stack([b for _, b, _ in bans]),
                ints(u for _, _, u in bans),
            )
        counted = [(i, s.count_slot, s.params) for i, s in states if s.count_slot is not None]
        if counted:
            batch.penalty = _Penalty(
                rows=ints(i for i, _, _ in counted),
                slot_ids=tuple(slot for _, slot, _ in counted),
                slots=ints(slot for _, slot, _ in counted),
                repetition=_column(p.repetition_penalty for _, _, p in counted),
                presence=_column(p.presence_penalty for _, _, p in counted),
                frequency=_column(p.frequency_penalty for _, _, p in counted),
            )
        batch.draw = _describe_draw(states, len(rows), self._vocab)
        wanted = [(i, s.params.logprobs) for i, s in states if s.params.logprobs is not None]
        if wanted:
            batch.logprobs = wanted
            batch.logprob_rows = ints(i for i, _ in wanted)
        return batch

    def _dense(self, values: dict[int, float]) -> mx.array:
        dense = np.zeros(self._vocab, np.float32)
        ids = np.fromiter(values.keys(), np.int64)
        known = (ids >= 0) & (ids < self._vocab)
        dense[ids[known]] = np.fromiter(values.values(), np.float32)[known]
        return mx.array(dense)


def _penalise(x: mx.array, output: mx.array, prompt: mx.array, p: _Penalty) -> mx.array:
    """Repetition over prompt and output; presence and frequency over the output. The tables have a row for
    each slot."""
    output = output[p.slots]
    seen = (output > 0) | (prompt[p.slots] > 0)
    repeated = mx.where(x > 0, x / p.repetition, x * p.repetition)
    x = mx.where(seen, repeated, x)
    return x - p.presence * (output > 0) - p.frequency * output


def _allow(x: mx.array, masks: Mapping[int, bytes]) -> mx.array:
    lines, vocab = x.shape
    allowed = np.ones((lines, vocab), bool)
    for line, mask in masks.items():
        allowed[line] = np.unpackbits(
            np.frombuffer(mask, np.uint8), bitorder="little", count=vocab
        ).view(bool)
    return mx.where(mx.array(allowed), x, -mx.inf)


def _penalises(p: SamplingParams) -> bool:
    return (p.repetition_penalty, p.presence_penalty, p.frequency_penalty) != (1.0, 0.0, 0.0)


def _describe_draw(states: Sequence[tuple[int, RowState]], lines: int, vocab: int) -> _Draw | None:
    drawing = [(i, s) for i, s in states if s.params.temperature > 0]
    if not drawing:
        return None
    params = [s.params for _, s in drawing]
    top_k: list[tuple[int, mx.array, mx.array]] = []
    lower = 0
    for width in (*TOP_K_WIDTHS, vocab):
        group = [(j, p.top_k) for j, p in enumerate(params) if lower < p.top_k <= width]
        if group and lower < vocab:
            ks = ints(min(k, vocab) for _, k in group)
            top_k.append((min(width, vocab), ints(j for j, _ in group), ks))
        lower = width
    nucleus = [(j, p.top_p) for j, p in enumerate(params) if p.top_p < 1]
    floor = [p.min_p for p in params]
    return _Draw(
        rows=ints(i for i, _ in drawing),
        all_rows=len(drawing) == lines,
        keys=mx.array([s.key for _, s in drawing], dtype=mx.uint32),
        temperature=_column(max(p.temperature, MIN_TEMPERATURE) for p in params),
        top_k=top_k,
        top_p=(ints(j for j, _ in nucleus), _column(p for _, p in nucleus)) if nucleus else None,
        log_min_p=_column(np.log(m) if m > 0 else -np.inf for m in floor) if any(floor) else None,
    )


def _draw(x: mx.array, positions: mx.array, draw: _Draw) -> mx.array:
    """A token a row by the Gumbel-max rule over what the filters leave."""
    x = x / draw.temperature
    if draw.top_k or draw.top_p is not None or draw.log_min_p is not None:
        x = mx.where(x >= _threshold(x, draw), x, -mx.inf)
    keys = mx.stack([draw.keys[:, 0], draw.keys[:, 1] ^ positions], axis=-1)
    return mx.argmax(x + _gumbel(keys, x.shape[-1]), axis=-1).astype(mx.int32)


def _gumbel(keys: mx.array, width: int) -> mx.array:
    return mx.vmap(lambda key: mx.random.gumbel((width,), key=key))(keys)


def _threshold(x: mx.array, draw: _Draw) -> mx.array:
    """[rows, 1]: the least scaled logit that top-k, then top-p, then min-p keep."""
    threshold = mx.full((x.shape[0], 1), -mx.inf)
    for width, rows, k in draw.top_k:
        threshold = _put(threshold, rows, _kth_largest(x[rows], width, k))
    top = mx.max(x, axis=-1, keepdims=True)
    if draw.top_p is not None:
        rows, p = draw.top_p
        nucleus = _nucleus_edge(x[rows], top[rows], threshold[rows], p)
        threshold = _put(threshold, rows, mx.maximum(threshold[rows], nucleus))
    if draw.log_min_p is not None:
        threshold = mx.maximum(threshold, top + draw.log_min_p)
    return threshold


def _kth_largest(x: mx.array, width: int, k: mx.array) -> mx.array:
    if width < x.shape[-1]:
        x = mx.partition(x, x.shape[-1] - width, axis=-1)[:, -width:]
    ascending = mx.sort(x, axis=-1)
    return mx.take_along_axis(ascending, (ascending.shape[-1] - k)[:, None], axis=-1)


def _nucleus_edge(x: mx.array, top: mx.array, threshold: mx.array, p: mx.array) -> mx.array:
    """Halve down to the largest edge whose tokens hold a share `p` of what `threshold` keeps."""
    below = top - x
    weight = mx.where(x >= threshold, mx.exp(-below), 0.0)
    wanted = p * mx.sum(weight, axis=-1, keepdims=True)
    low, high = mx.zeros_like(top), mx.full(top.shape, TOP_P_RANGE)
    # The most likely tokens alone may do: then the edge is the maximum itself.
    enough = mx.sum(mx.where(below <= 0, weight, 0.0), axis=-1, keepdims=True) >= wanted
    for _ in range(TOP_P_STEPS):
        middle = (low + high) / 2
        reached = mx.sum(mx.where(below <= middle, weight, 0.0), axis=-1, keepdims=True) >= wanted
        low, high = mx.where(reached, low, middle), mx.where(reached, middle, high)
    kept = below <= mx.where(enough, 0.0, high)
    return mx.min(mx.where(kept, x, mx.inf), axis=-1, keepdims=True)


def _log_probabilities(draw: Draw, raw: mx.array, rows: mx.array) -> None:
    x = raw[rows]
    total = mx.logsumexp(x, axis=-1, keepdims=True)
    chosen = draw.tokens[rows][:, None]
    draw.chosen = (mx.take_along_axis(x, chosen, axis=-1) - total)[:, 0]
    if any(k for _, k in draw.wanted):
        # Always as many as can be asked for: which of two tied tokens is in must not depend on k.
        width = min(MAX_LOGPROBS, x.shape[-1])
        draw.top_ids = mx.argpartition(x, x.shape[-1] - width, axis=-1)[:, -width:]
        draw.top_logprobs = mx.take_along_axis(x, draw.top_ids, axis=-1) - total


def _column(values: Iterable[float]) -> mx.array:
    return mx.array(list(values), dtype=mx.float32)[:, None]


def _put(x: mx.array, rows: mx.array, values: mx.array) -> mx.array:
    """`x` with some of its rows replaced."""
    if rows.shape[0] == x.shape[0]:
        return values
    y = mx.array(x)
    y[rows] = values
    return y
