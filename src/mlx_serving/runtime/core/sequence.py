"""One prompt being continued: the scheduler's mutable unit.

    waiting ──admit──▶ running ──stop | length | cancel──▶ finished
       ▲                  │
       └─────preempt──────┘   (tokens still in flight are absorbed while it waits, and may finish it)

There are no phases: `computed` catches up with `wanted`. One position to go is a decode row,
more are a prefill chunk (or, of tokens that a grammar forced, a longer decode row); prompts, chunked
prefill, preemption and resumption all follow.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from mlx_serving.runtime.core.plan import Constraint, DecodeRow, PrefillChunk, RowStart
from mlx_serving.runtime.core.prefix import Block
from mlx_serving.types import NO_TURN, FinishReason, Priority, SamplingParams, Turn


class Status(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """What the host knows of one sequence. All lengths are in tokens."""

    seq_id: int
    tokens: list[int]
    """The prompt and what was generated, as far as the host knows it. Owned by the sequence."""
    prompt_len: int
    sampling: SamplingParams
    priority: Priority = Priority.NORMAL
    constraint: Constraint | None = None
    compiling: bool = False
    """It waits for its constraint, and gets no row before."""
    salt: str | None = None
    """It shares prefixes only with sequences of the same salt."""
    adapter: str | None = None
    """What is added to the model's weights for it; it shares prefixes only with sequences of the same."""
    turn: Turn = NO_TURN
    pooled: bool = False
    """It ends with its prompt, as a vector. It neither takes nor leaves prefix blocks: what is embedded
    seldom comes again, and would push out the chats'."""
    second_at: int | None = None
    """Of a pair of texts: where the second one begins."""

    # Set by Scheduler.add.
    arrival: int = -1
    arrived_s: float = 0.0
    rank: float = 0.0
    """`policy.rank`'s."""
    limit: int = 0
    """Length at which it ends: prompt and `max_tokens`, or the context."""
    stops: frozenset[int] = frozenset()
    """Tokens that end it: its own stop tokens and, unless ignored, the model's."""

    status: Status = Status.WAITING
    row: int | None = None
    computed: int = 0
    """Positions whose KV is in its row once every launched step has run."""
    inflight: int = 0
    """Tokens that launched steps sample and whose values the host does not know yet."""
    foreseen: int = 0
    """Tokens that launched steps sample and whose values the host knew before: the oldest in flight."""
    began: int = 0
    """Tokens that it had when it took its row. What it got since is decoded, also several at once."""
    paused: bool = False
    queued: bool = False
    """It has an entry in the waiting queue."""
    admitted_s: float | None = None
    """When it first got a row, by the clock that `Scheduler.schedule` is given."""

    promoted: bool = False
    """It has waited too long, and goes before every class from now on."""
    charged: int = 0
    """Positions that its client was charged for."""

    # Kept by Sharing.
    keys: list[bytes] = field(default_factory=list)
    """Of its full blocks, as far as they were needed."""
    tip: Block | None = None
    """The last block of its prefix that is published, which it holds."""
    shared: int = 0
    """Blocks up to the tip."""
    reused: int = 0
    """Positions that were copied into its row."""
    reads_until_s: float = 0.0
    """How long it waits for blocks on their way from disk."""
    disk_since_s: float | None = None
    """Since when only the disk kept it from a row; None: it did not."""
    promises: bool = False
    """Others may be waiting for what its prefill computes."""
    cached: int = 0
    """Prompt tokens that were copied when it first got a row."""
    kept: int = 0
    """Prompt tokens that its blocks hold, copied or published by it."""
    told: bool = False
    """Its reader knows of both."""

    @property
    def held(self) -> bool:
        """Kept out of the queue, whatever rows are free."""
        return self.paused or self.compiling

    @property
    def wanted(self) -> int:
        return len(self.tokens) + self.inflight

    @property
    def prefills(self) -> bool:
        """Its gap is closed by a chunk. A gap of one is a decode row's, but where nothing is decoded."""
        gap = self.wanted - self.computed
        if gap > 1:
            return self.computed < self.began
        return self.pooled and gap == 1 and not self.inflight

    @property
    def decodes(self) -> bool:
        """A decode row closes its gap, and samples the next token."""
        return not (self.prefills or self.pooled) and self.computed < self.wanted < self.limit

    @property
    def order(self) -> tuple[int, int]:
        """Who is served first of those that have a row: by class, then by arrival."""
        return -1 if self.promoted else self.priority, self.arrival

    def bind(self, arrival: int, context_length: int, eos_token_ids: Iterable[int]) -> None:
        """Fix what depends on the model: the length at which it ends, and the tokens that end it."""
        self.arrival = arrival
        self.limit = min(self.prompt_len + self.sampling.max_tokens, context_length)
        stops = self.sampling.stop_token_ids
        self.stops = frozenset(stops if self.sampling.ignore_eos else (*stops, *eos_token_ids))

    def reach(self, ahead: int = 0) -> int:
        """KV positions it needs now, or once it is `ahead` tokens longer; its last token needs none."""
        wanted, last = len(self.tokens) + self.inflight + ahead, self.limit - 1
        return wanted if wanted < last else last

    def start(self, found: Items[Block]) -> RowStart:
        """It takes its row, and begins with what is copied from these blocks."""
        assert self.row is not None
        return RowStart(
            self.row,
            self.seq_id,
            tuple(self.tokens),
            self.prompt_len,
            self.sampling,
            self.constraint,
            blocks=tuple([block.id for block in found]),
            reused=self.reused,
            second_at=self.second_at,
            adapter=self.adapter,
        )

    def chunk(self, length: int) -> PrefillChunk:
        """Compute so many positions more; the last one samples a token, where nothing comes after it."""
        assert self.row is not None
        start, end = self.computed, self.computed + length
        samples = end == len(self.tokens)
        self.computed = end
        self.inflight += samples
        tokens = tuple(self.tokens[start:end])
        return PrefillChunk(self.row, self.seq_id, tokens, start, samples, self.pooled)

    def decode(self) -> DecodeRow:
        """Compute what is wanted and sample a token, behind one that may still be in flight."""
        assert self.row is not None
        position = self.computed
        self.computed = self.wanted
        self.inflight += 1
        if self.inflight > 1:
            return DecodeRow(self.row, self.seq_id, position, None)
        token, *forced = self.tokens[position:]
        return DecodeRow(self.row, self.seq_id, position, token, tuple(forced))

    def absorb(self, token: int) -> FinishReason | None:
        """Take the value of the oldest token in flight; say whether it ends the sequence."""
        assert self.inflight > 0
        self.inflight -= 1
        return self._append(token)

    def foresee(self, start: int, tokens: Items[int]) -> tuple[list[int], FinishReason | None]:
        """Take tokens from position `start` on before they arrive; say which of them it had not, up to
        its end, and whether that ends it."""
        taken: list[int] = []
        for token in tokens[len(self.tokens) - start :]:
            if self.inflight:
                self.inflight -= 1
                self.foreseen += 1
            taken.append(token)
            reason = self._append(token)
            if reason is not None:
                return taken, reason
        assert not (taken and self.inflight), "what is in flight comes before what is not"
        return taken, None

    def _append(self, token: int) -> FinishReason | None:
        self.tokens.append(token)
        if token in self.stops:
            return "stop"
        return "length" if len(self.tokens) >= self.limit else None

    def tell_reuse(self) -> tuple[int, int]:
        """Prompt tokens that were found in blocks, and those that it computed and left in some: once."""
        if self.told:
            return 0, 0
        self.told = True
        return self.cached, max(0, self.kept - self.cached)

    def forget(self) -> None:
        """Its row is gone: wait, and compute everything again."""
        self.status = Status.WAITING
        self.computed = 0
