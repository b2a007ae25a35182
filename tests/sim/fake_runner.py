"""A runner whose next token is a pure function of its row's real prefix.

It keeps what a device would keep (each row's KV, the token it sampled last, and prefix blocks), obeys
plans to the letter and asserts everything that the real runner takes for granted.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field

from mlx_serving.runtime.core.plan import (
    MAX_FORCED,
    DecodeRow,
    Forced,
    Limits,
    PrefillChunk,
    Publish,
    RowStart,
    Sampled,
    StepPlan,
    StepResult,
)
from mlx_serving.runtime.core.rows import held
from mlx_serving.types import SamplingParams, TokenLogprob
from sim.fake_disk import FakeDisk

VOCAB = 40


def next_token(
    prefix: Tokens[int], prompt_len: int, sampling: SamplingParams, eos: Tokens[int]
) -> tuple[int, TokenLogprob]:
    """What a model would sample after `prefix`: a hash of it, keyed by seed and choice."""
    banned: set[int] = set()
    if len(prefix) - prompt_len < sampling.min_tokens:
        banned.update(sampling.stop_token_ids, () if sampling.ignore_eos else eos)
    digest = hash((tuple(prefix), sampling.seed, sampling.choice)) >> 5
    token = digest % VOCAB
    while token in banned:
        token = (token + 1) % VOCAB
    return token, TokenLogprob(-(digest % 1009) / 100)


def is_forced(prefix: Tokens[int], sampling: SamplingParams) -> bool:
    """Whether a grammar would leave no choice after `prefix`: for some sequences every third time or
    almost always, for others never. One with log-probabilities has to be sampled."""
    if sampling.logprobs is not None:
        return False
    often = (0, 0, 1, 3)[sampling.seed % 4]
    return (hash((tuple(prefix), sampling.choice)) >> 7) % 10 < 3 * often


@dataclass(slots=True)
class _Row:
    start: RowStart
    kv: list[int] = field(default_factory=list)
    last_sampled: int | None = None
    whole_chunk: bool = False
    """What it computed last was one whole prefill chunk."""
    foreseen: list[int] = field(default_factory=list)
    """What was told of it: the next decode row computes all of that."""


@dataclass(slots=True)
class _Done:
    result: StepResult
    disk: FakeDisk | None
    waits: bool

    def wait(self) -> StepResult:
        if self.disk is not None:
            self.result.disk = self.disk.events(wait=self.waits)
        return self.result


class FakeRunner:
    """`rng` only shuffles the order of a result's rows, which means nothing. `salts`: by seq_id, where
    it is not None."""

    def __init__(
        self,
        limits: Limits,
        rng: random.Random | None = None,
        salts: Mapping[int, str | None] | None = None,
        disk: FakeDisk | None = None,
    ) -> None:
        self.limits = limits
        self.disk = disk
        self.rows: dict[int, _Row] = {}
        self.blocks: dict[int, tuple[str | None, tuple[int, ...]]] = {}
        """Salt and whole prefix: KV depends on every token before it."""
        self._rng = rng or random.Random(0)
        self._newest: list[_Row] = []
        """Those that the newest step samples."""
        self._salts = salts or {}

    def foresee(self) -> list[Forced]:
        """What is forced after what the newest step samples, or that and what is forced after it; and
        a few tokens before, which the host may not know yet."""
        newest, self._newest = self._newest, []
        told = []
        for row in newest:
            assert row.last_sampled is not None
            prompt_len, sampling = row.start.prompt_len, row.start.sampling
            run = [row.last_sampled]
            while len(run) < MAX_FORCED and is_forced(prefix := [*row.kv, *run], sampling):
                run.append(next_token(prefix, prompt_len, sampling, self.limits.eos_token_ids)[0])
            if len(run) > 1:
                row.foreseen = run
                at = max(prompt_len, len(row.kv) - self._rng.randint(2, 4))
                told.append(Forced(row.start.seq_id, at, (*row.kv[at:], *run)))
        self._rng.shuffle(told)
        return told

    def reset(self) -> None:
        self._newest.clear()
        self.rows.clear()
        self.blocks.clear()

    def launch(self, plan: StepPlan) -> _Done:
        if plan.keep_blocks is not None:
            self.blocks = {i: self.blocks[old] for i, old in enumerate(plan.keep_blocks)}
        self._newest.clear()
        self._arrange(plan)
        result = StepResult(plan.step_id)
        assert plan.prefill_tokens <= self.limits.prefill_step_size
        busy: set[int] = set()
        for chunk in plan.prefill:
            assert chunk.row not in busy, "a row works twice in one step"
            busy.add(chunk.row)
            self._prefill(chunk, result)
        assert [d.row for d in plan.decode] == sorted(d.row for d in plan.decode)
        for decode in plan.decode:
            assert decode.row not in busy, "a row works twice in one step"
            busy.add(decode.row)
            self._decode(decode, result)
        for publish in plan.publish:
            self._publish(publish)
        if self.disk is not None:
            self.disk.after(plan, self.blocks)
        limits, lengths = self.limits, [len(row.kv) for row in self.rows.values()]
        taken = held(lengths, limits.kv_bucket_tokens, own=limits.kv_own_rows)
        assert taken <= limits.kv_capacity_tokens, "KV memory overdrawn"
        self._rng.shuffle(result.sampled)
        return _Done(result, self.disk, plan.disk.wait)

    def _arrange(self, plan: StepPlan) -> None:
        for row in plan.frees:
            del self.rows[row]
        for source, to in plan.moves:
            assert to < source and to not in self.rows, "a move over a row in use"
            self.rows[to] = self.rows.pop(source)
        if self.disk is not None:
            self.disk.before(plan, self.blocks)
        for start in plan.starts:
            assert start.row not in self.rows, "a start over a row in use"
            self.rows[start.row] = self._begin(start)
        assert sorted(self.rows) == list(range(len(self.rows))), "rows are not dense"
        assert len(self.rows) <= self.limits.max_num_seqs

    def _begin(self, start: RowStart) -> _Row:
        size, salt = self.limits.prefix_block_tokens, self._salts.get(start.seq_id)
        assert start.reused == len(start.blocks) * size < len(start.token_ids)
        for i, block in enumerate(start.blocks):
            prefix = start.token_ids[: (i + 1) * size]
            assert self.blocks[block] == (salt, prefix), f"block {block} holds something else"
        return _Row(start, list(start.token_ids[: start.reused]))

    def _publish(self, publish: Publish) -> None:
        row, size = self.rows[publish.row], self.limits.prefix_block_tokens
        assert row.start.seq_id == publish.seq_id and publish.blocks
        end = publish.start + len(publish.blocks) * size
        assert publish.start % size == 0 and end <= len(row.kv), "published before it is computed"
        if self.limits.prefix_whole_chunks:
            assert row.whole_chunk and end == len(row.kv) == publish.start + size
        for i, block in enumerate(publish.blocks):
            assert block < self.limits.prefix_blocks
            prefix = tuple(row.kv[: publish.start + (i + 1) * size])
            self.blocks[block] = self._salts.get(publish.seq_id), prefix

    def _prefill(self, chunk: PrefillChunk, result: StepResult) -> None:
        row, step_size = self.rows[chunk.row], self.limits.prefill_step_size
        known = row.start.token_ids
        end = chunk.start + len(chunk.token_ids)
        assert row.start.seq_id == chunk.seq_id and row.last_sampled is None
        assert chunk.start == len(row.kv)
        cut = self.limits.prefill_grain or step_size
        assert chunk.start % cut == 0 or chunk.start == row.start.reused, "cut elsewhere"
        assert len(chunk.token_ids) > 0 and chunk.token_ids == known[chunk.start : end]
        assert end == len(known) or end % cut == 0, "cut elsewhere"
        if self.limits.prefix_whole_chunks:
            assert chunk.start % step_size == 0, "a reused prefix has shifted the cuts"
        row.whole_chunk = len(chunk.token_ids) == step_size
        assert chunk.samples == (end == len(known))
        row.kv += chunk.token_ids
        if chunk.samples:
            self._sample(row, result)

    def _decode(self, decode: DecodeRow, result: StepResult) -> None:
        row = self.rows[decode.row]
        known = row.start.token_ids
        assert row.start.seq_id == decode.seq_id and decode.position == len(row.kv)
        on_device = row.last_sampled
        if on_device is None:
            assert len(row.kv) == len(known) - 1, "decodes before its prefill is complete"
            on_device = known[-1]
            assert decode.token_id is not None
        assert decode.token_id in (None, on_device), "the host has another token than the device"
        known = [on_device, *decode.forced]
        assert not decode.forced or decode.token_id is not None
        assert known == (row.foreseen or [on_device]), "it does not compute what was foreseen"
        row.foreseen = []
        row.kv += known
        row.whole_chunk = False
        self._sample(row, result)

    def _sample(self, row: _Row, result: StepResult) -> None:
        start, sampling = row.start, row.start.sampling
        end = min(start.prompt_len + sampling.max_tokens, self.limits.context_length)
        assert len(row.kv) < end, "sampled past max_tokens or the context"
        token, logprob = next_token(row.kv, start.prompt_len, sampling, self.limits.eos_token_ids)
        row.last_sampled = token
        self._newest.append(row)
        logprobs = None if sampling.logprobs is None else [logprob]
        result.sampled.append(Sampled(start.seq_id, [token], logprobs))
