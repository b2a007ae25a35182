"""The step as data: what the scheduler wants (`StepPlan`) and what came of it (`StepResult`).

The runner obeys a plan in this order: frees, moves, fills from disk, starts, prefill chunks, the
decode forward, publications, copies for the disk.
The device executes plans in the order they were launched, so a plan may reuse a row that
an earlier, still running plan computes for a sequence that has meanwhile ended.

Positions count from 0 at the prompt's first token. "The token at position p" is a forward
pass's input; what is sampled from its logits becomes position p + 1, and its random numbers
are keyed by (seed, choice, p + 1): the same on resumption, in any row, beside any neighbour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from mlx_serving.errors import MLXServingError
from mlx_serving.runtime.core.disk import NO_ORDERS, DiskEvent, DiskOrders
from mlx_serving.types import SamplingParams, TokenLogprob


class Matcher(Protocol):
    """How far one sequence has got in its grammar."""

    def accept(self, token_id: int) -> None:
        """The sequence's next token."""
        ...

    def mask(self) -> bytes | None:
        """What may come next: token i is bit `i % 8` of byte `i // 8`. None: anything may, for the
        sequence has ended. Raises MLXServingError, once, when the grammar turns out to be more
        than its bounds allow."""
        ...

    def forced(self, most: int) -> list[int]:
        """The tokens that have to come next, accepted one after the other: up to `most`, the first
        choice, or the end."""
        ...


class Constraint(Protocol):
    """A compiled grammar, shared by the sequences that follow it."""

    def matcher(self, output: Sequence[int]) -> Matcher:
        """A matcher that has accepted `output`."""
        ...


@dataclass(frozen=True, slots=True)
class RowStart:
    """A sequence takes an empty row. `token_ids` is all it has so far (penalties count them; those
    from `prompt_len` on are output)."""

    row: int
    seq_id: int
    token_ids: tuple[int, ...]
    prompt_len: int
    sampling: SamplingParams
    constraint: Constraint | None = None
    blocks: tuple[int, ...] = ()
    """Prefix blocks to copy into the row, in order."""
    reused: int = 0
    """Positions that are thereby computed."""
    second_at: int | None = None
    """Of a pair of texts: where the second one begins."""
    adapter: str | None = None
    """What is added to the model's weights for this row (`backend.model.LoadedAdapter.tag`)."""

    @property
    def foreseeable(self) -> bool:
        """Tokens that its grammar forces may be told before a step has sampled them. A
        log-probability needs the step."""
        return self.constraint is not None and self.sampling.logprobs is None


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Compute positions [start, start + len(token_ids)) of one row, unpadded."""

    row: int
    seq_id: int
    token_ids: tuple[int, ...]
    start: int
    samples: bool
    """The chunk reaches the last known token: sample the next one from its last logits, or give the
    vector of a sequence that is pooled."""
    pooled: bool = False


class DecodeRow(msgspec.Struct, frozen=True, gc=False):
    """Compute one position of one row in the batched forward, and those of tokens that are known to
    follow; sample the token after them."""

    row: int
    seq_id: int
    position: int
    token_id: int | None
    """None: the token that the row sampled last, which is still on the device."""
    forced: tuple[int, ...] = ()
    """What follows `token_id`, which then is not None."""

    @property
    def last(self) -> int:
        """The last position that it computes."""
        return self.position + len(self.forced)


@dataclass(frozen=True, slots=True)
class Publish:
    """Copy a row's positions from `start` on into prefix blocks, in order: block i takes the i-th
    `prefix_block_tokens` of them and, where layers have recurrent state, the row's state."""

    row: int
    seq_id: int
    start: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StepPlan:
    step_id: int
    frees: tuple[int, ...] = ()
    """Rows whose sequences have left."""
    moves: tuple[tuple[int, int], ...] = ()
    """(from, to): rows that move into a hole, so that rows in use stay a dense prefix."""
    starts: tuple[RowStart, ...] = ()
    prefill: tuple[PrefillChunk, ...] = ()
    decode: tuple[DecodeRow, ...] = ()
    """In order of rows."""
    publish: tuple[Publish, ...] = ()
    keep_blocks: tuple[int, ...] | None = None
    """Not None: before all else, the pool of prefix blocks keeps these, as 0, 1, …, and no others."""
    slab_tokens: int | None = None
    """Rows' slabs may have room to spare up to this; 0: none; None: as before."""
    disk: DiskOrders = NO_ORDERS

    @property
    def prefill_tokens(self) -> int:
        return sum(len(chunk.token_ids) for chunk in self.prefill)

    @property
    def forced_tokens(self) -> int:
        """Those that take no step of their own."""
        return sum(len(row.forced) for row in self.decode)


@dataclass(frozen=True, slots=True)
class Forced:
    """Tokens of one sequence from position `start` on, known before they were sampled, because its
    grammar leaves no choice. They begin with what launched steps still sample, if anything."""

    seq_id: int
    start: int
    token_ids: tuple[int, ...]


@dataclass(slots=True)
class Sampled:
    """The tokens that one sequence gained in a step (more than one once drafts are verified)."""

    seq_id: int
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    error: MLXServingError | None = None
    """The sequence cannot go on: its tokens of this step mean nothing."""
    vector: bytes | None = None
    """Of a pooled sequence, in place of tokens: float32, little-endian."""


@dataclass(slots=True)
class StepResult:
    step_id: int
    sampled: list[Sampled] = field(default_factory=list)
    disk: Sequence[DiskEvent] = ()
    """What the disk has done since the last result, in order."""


MAX_DEPTH = 3
"""Steps in flight, at most (`Config.pipeline_depth`)."""
MAX_FORCED = 16
"""Tokens that a grammar forces, told at once: they share one step with the other rows."""


class PendingStep(Protocol):
    def wait(self) -> StepResult:
        """Block until the step's tokens are on the host."""
        ...


class Runner(Protocol):
    """What executes plans: MLX in earnest, a pure function of the prefix in simulation."""

    def launch(self, plan: StepPlan) -> PendingStep:
        """Enqueue a plan behind those already launched; return without waiting for it."""
        ...

    def foresee(self) -> Sequence[Forced]:
        """What is known of the tokens that come next; asked before a step is planned. The next
        decode row of a sequence that is named computes all of them."""
        ...

    def reset(self) -> None:
        """Forget every row and prefix block (after a failed step)."""
        ...


@dataclass(frozen=True, slots=True)
class Limits:
    """What the scheduler must keep to, for one loaded model."""

    max_num_seqs: int
    """Rows."""
    prefill_step_size: int
    """Chunks are cut at multiples of it from position 0."""
    context_length: int
    kv_capacity_tokens: int
    """Row tokens that fit memory, as `rows.held` counts them."""
    kv_bucket_tokens: int = 256
    """A row's capacity grows in multiples of this."""
    eos_token_ids: tuple[int, ...] = ()
    max_wait_s: float = math.inf
    """A sequence that has waited so long for a row goes before every class, in a share of the rows."""
    short_jobs_first: bool = False
    prefix_blocks: int = 0
    """Prefix blocks that the runner keeps; 0: no prefix is reused."""
    prefix_block_tokens: int = 16
    prefill_budget: int | None = None
    """Prefill tokens a step; a chunk of more has a step to itself. None: `prefill_step_size`."""
    prefix_whole_chunks: bool = False
    """A block is one whole prefill chunk, and what was computed otherwise is never published. For
    arithmetic that depends on where chunks are cut, and for state that is only there at their ends."""
    max_itl_s: float = 0.0
    """The longest gap between tokens that prefill should cause running streams; 0: no target."""
    prefill_grain: int = 0
    """Where steps are to be shorter, chunks may also end at multiples of this; 0: results would depend
    on it."""
    prefix_block_bytes: int = 0
    disk_block_bytes: int = 0
    """A block's file takes no more."""
    disk_bytes: int = 0
    """What the folder of block files may take; 0: none are kept."""
    kv_bytes_per_token: int = 0
    """0: rows take no memory that is counted."""
    kv_own_rows: bool = False
    """A row takes what its own length needs; else each takes what the longest needs."""
