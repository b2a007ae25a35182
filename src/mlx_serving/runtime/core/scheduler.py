"""Which sequence computes what in the next step.

    plan = scheduler.schedule(now_s)       up to the pipeline's depth before
    result = runner.launch(plan).wait()
    emitted = scheduler.apply(result)      in the order of launching

A pure state machine: time is an argument, the plan is data. A step costs O(rows); sequences
that wait cost nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import count

from mlx_serving.errors import (
    ContextOverflow,
    DeadlineExceeded,
    InvalidRequest,
    MLXServingError,
)
from mlx_serving.runtime.core import policy
from mlx_serving.runtime.core.disk import DiskOrders, Scanned
from mlx_serving.runtime.core.memory import Claim, Room
from mlx_serving.runtime.core.pace import Pace
from mlx_serving.runtime.core.plan import (
    Constraint,
    Forced,
    Limits,
    Publish,
    Sampled,
    StepPlan,
    StepResult,
)
from mlx_serving.runtime.core.prefix import Block
from mlx_serving.runtime.core.rows import Rows, held
from mlx_serving.runtime.core.sequence import Sequence, Status
from mlx_serving.runtime.core.shares import Shares
from mlx_serving.runtime.core.sharing import Sharing
from mlx_serving.runtime.core.vigil import SHORT_TOKENS, Vigil
from mlx_serving.runtime.core.waiting import WaitingQueue
from mlx_serving.types import CacheStats, FinishReason, Priority, TokenLogprob

GROW_AHEAD = 32
"""Tokens that rows may grow before memory asked for now has to be there."""


@dataclass(slots=True)
class Emitted:
    """What one sequence gained in a step. The one with `finish_reason` is its last; a cancelled
    sequence has none."""

    seq_id: int
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    """The token (end of sequence, or a stop token) that ended it; it is also in `token_ids`."""
    error: MLXServingError | None = None
    """Why, where `finish_reason` is "error"."""
    cached_tokens: int = 0
    """Prompt tokens that were copied from prefix blocks, with the first token."""
    cache_write_tokens: int = 0
    """Prompt tokens that were computed and left in prefix blocks, with the first token."""
    vector: bytes | None = None
    """Of a pooled sequence, with its only `finish_reason`."""


class Scheduler:
    """Continuous batching over dense rows with one quantity, `wanted - computed`.

    Each step decodes every row that has one position to go and spends at most
    `prefill_budget` tokens on prefill, in order of class and arrival. A sequence is admitted
    when its first chunk and its KV fit, with headroom; when growth does not fit, rows are
    preempted and recomputed later. A known prefix is copied, one that is being computed awaited.
    """

    def __init__(
        self,
        limits: Limits,
        on_disk: Scanned | None = None,
        arrivals: Iterator[int] | None = None,
    ) -> None:
        """`on_disk`: the block files that earlier workers left. `arrivals`: numbers for those that
        come, where several models' sequences stand in one order."""
        self.limits = limits
        self.context_length = policy.usable_context(limits)
        """Tokens a sequence may have, prompt and answer together."""
        assert self.context_length >= 2, f"no sequence fits {limits}"
        self.sequences: dict[int, Sequence] = {}
        self.rows = Rows()
        self.shares = Shares()
        self.queue = WaitingQueue(self.shares, limits.max_wait_s)
        self.tune()
        self.step_s = 0.0
        """What a step takes of late; 0: not known."""
        self.refused: list[Emitted] = []
        """Ended before they began, since they could not have ended in time; for the caller to take."""
        self.sharing = Sharing(limits)
        self.pace = Pace(limits.max_itl_s)
        self.vigil = Vigil()
        if on_disk is not None:
            self.sharing.disk.take(on_disk)
        self.launched: deque[tuple[int, int]] = deque()
        """Steps in flight, oldest first: (step_id, sequences it samples)."""
        self.held = 0
        """Sequences whose readers are slow, or whose grammars are not compiled yet."""
        self._arrivals = count() if arrivals is None else arrivals
        self._room: Room | None = None
        self._alone = True
        self._steps = 0

    # -- what the client wants ------------------------------------------------------------

    def add(self, seq: Sequence, now_s: float = 0.0) -> None:
        """Queue a sequence, new or resumed (its tokens then include what was generated). One that is
        `compiling` gets no row before `provide`; what disk has of its prefix is read meanwhile.

        Raises ContextOverflow if it can never fit, InvalidRequest if nothing is left to generate.
        """
        assert seq.seq_id not in self.sequences, f"sequence {seq.seq_id} exists"
        assert (
            seq.status is Status.WAITING
            and not seq.paused
            and 0 < seq.prompt_len <= len(seq.tokens)
        )
        if len(seq.tokens) >= self.context_length:
            raise ContextOverflow(
                f"{len(seq.tokens)} tokens leave no room for an answer: at most "
                f"{self.context_length - 1} fit (context {self.limits.context_length} tokens, "
                f"KV memory {self.limits.kv_capacity_tokens} tokens)"
            )
        if len(seq.tokens) >= seq.prompt_len + seq.sampling.max_tokens:
            raise InvalidRequest(
                f"max_tokens is {seq.sampling.max_tokens} and "
                f"{len(seq.tokens) - seq.prompt_len} tokens exist: nothing to generate",
                param="max_tokens",
            )
        seq.bind(next(self._arrivals), self.context_length, self.limits.eos_token_ids)
        seq.arrived_s = now_s if seq.turn.arrived_s is None else min(now_s, seq.turn.arrived_s)
        seq.rank = policy.rank(seq, self.limits)
        self.shares.enter(seq.turn.client)
        self.sequences[seq.seq_id] = seq
        if seq.priority is Priority.CRITICAL:
            self.vigil.prolong(now_s)
        if seq.compiling:
            self.held += 1
        else:
            self.queue.push(seq)
        self.sharing.expect(seq)

    def provide(self, seq_id: int, constraint: Constraint) -> None:
        """The constraint that a sequence waits for; nothing if it has ended."""
        seq = self.sequences.get(seq_id)
        if seq is not None:
            assert seq.compiling
            seq.constraint = constraint
            self.held += self.queue.hold(seq, seq.paused, compiling=False)

    def cancel(self, seq_id: int) -> bool:
        """Drop a sequence: nothing more is emitted for it, and the next plan frees its row.
        False if it has already ended."""
        seq = self.sequences.get(seq_id)
        if seq is None:
            return False
        self._finish(seq)
        return True

    def pause(self, seq_id: int) -> None:
        """Compute nothing more for it. It keeps its row until another sequence needs that."""
        seq = self.sequences.get(seq_id)
        if seq is not None:
            self.held += self.queue.hold(seq, True, seq.compiling)

    def resume(self, seq_id: int) -> None:
        seq = self.sequences.get(seq_id)
        if seq is not None:
            self.held += self.queue.hold(seq, False, seq.compiling)

    def tune(self, max_num_seqs: int | None = None, prefill_tokens: int | None = None) -> None:
        """How much is taken on at once, from the next plan on; None: what `limits` have."""
        self.ceilings = policy.ceilings(self.limits, max_num_seqs, prefill_tokens)
        self.queue.lane_rows = policy.lane_rows(self.ceilings.rows)

    def take_turns(self, max_wait_s: float, short_jobs_first: bool) -> None:
        """As `limits` have them, from now on; ranks stay as they were given."""
        self.limits = replace(self.limits, max_wait_s=max_wait_s, short_jobs_first=short_jobs_first)
        self.queue.take_turns(max_wait_s)

    def reset(self) -> None:
        """The runner has forgotten every row and step in flight: compute all again."""
        running = list(self.rows)
        self.rows.clear()
        self.launched.clear()
        for seq in self.sequences.values():
            seq.inflight = seq.foreseen = 0
        for seq in running:
            self._requeue(seq)
        self.sharing.clear()

    # -- the step -------------------------------------------------------------------------

    def depth(self, most: int, now_s: float) -> int:
        """How many steps to have in flight."""
        short = self.vigil.lasts(now_s) and any(s.priority != Priority.CRITICAL for s in self.rows)
        return 1 if short else most

    def foresee(self, known: Iterable[Forced]) -> list[Emitted]:
        """Take tokens that no step needs to sample, before the next one is planned."""
        emitted = []
        for forced in known:
            seq = self.sequences.get(forced.seq_id)
            if seq is not None:
                tokens, reason = seq.foresee(forced.start, forced.token_ids)
                if tokens:
                    emitted.append(self._emit(seq, tokens, None, reason))
        return emitted

    def schedule(self, now_s: float) -> StepPlan | None:
        """The next step, or None if there is nothing to do before the next `apply` or client's wish."""
        kept = None if self._room is None else self.sharing.fit(self._room.prefix_bytes)
        self._shed()
        self.queue.advance(now_s, self.rows)
        self.sharing.prepare(now_s, self.pace.s_per_token)
        prefill, starts = self._choose_prefill(now_s)
        urgent, joined = _most_urgent(prefill), {seq for seq, _ in starts}
        self._bound_prefixes()
        frees, moves = self.rows.settle()
        decode = [
            seq
            for seq in self.rows
            if seq.decodes
            and not seq.paused
            and (seq in joined or not policy.stands_aside(seq, urgent, now_s, self.limits))
        ]
        chunks = tuple([seq.chunk(length) for seq, length in prefill])
        decoded = tuple([seq.decode() for seq in decode])
        publish = self._publish(prefill, decode)
        disk = self._disk_orders(idle=not (chunks or decoded or frees))
        if not (chunks or decoded or frees or disk or kept is not None):
            return None
        plan = StepPlan(
            step_id=self._steps,
            frees=frees,
            moves=moves,
            starts=tuple([seq.start(found) for seq, found in starts]),
            prefill=chunks,
            decode=decoded,
            publish=publish,
            disk=disk,
            keep_blocks=kept,
            slab_tokens=self._slab_tokens,
        )
        for seq in (*[seq for seq, _ in prefill], *decode):
            self.shares.charge(seq)
        samples = len(plan.decode) + sum(chunk.samples for chunk in plan.prefill)
        self.launched.append((self._steps, samples))
        self._steps += 1
        return plan

    def apply(self, result: StepResult) -> list[Emitted]:
        """Take the oldest launched step's tokens. Those of sequences that have ended, or that were
        computed past an end, are discarded."""
        step_id, samples = self.launched.popleft()
        assert (result.step_id, len(result.sampled)) == (step_id, samples), (step_id, samples)
        for event in result.disk:
            self.sharing.disk.take(event)
        sequences = self.sequences
        emitted = []
        for sampled in result.sampled:
            seq = sequences.get(sampled.seq_id)
            if seq is None:
                continue
            if seq.foreseen:
                seq.foreseen -= 1
            else:
                emitted.append(self._absorb(seq, sampled))
        return emitted

    def clear_cache(self) -> None:
        """Forget every prefix that no running sequence uses."""
        self.sharing.forget_unused()

    def cache_stats(self) -> CacheStats:
        return self.sharing.stats()

    def observe(self, plan: StepPlan, step_s: float) -> None:
        """How long a step took."""
        grain = self.ceilings.grain
        self.pace.observe(len(plan.decode), plan.prefill_tokens, step_s, grain)
        self.step_s = policy.blend(self.step_s, step_s)

    def _disk_orders(self, *, idle: bool) -> DiskOrders:
        orders = self.sharing.orders()
        if idle and not self.launched and self._awaits_disk:
            orders = replace(orders, wait=True)
        return orders

    @property
    def _awaits_disk(self) -> bool:
        disk = self.sharing.disk
        return disk.behind or (bool(disk.reading) and self.queue.peek() is not None)

    def _publish(
        self, prefill: list[tuple[Sequence, int]], decode: list[Sequence]
    ) -> tuple[Publish, ...]:
        advance = self.sharing.advance
        found = [advance(seq, length) for seq, length in prefill]
        found += [advance(seq) for seq in decode]
        return tuple([one for one in found if one is not None])

    def _absorb(self, seq: Sequence, sampled: Sampled) -> Emitted:
        if sampled.error is not None:
            self._finish(seq)
            return Emitted(sampled.seq_id, [], finish_reason="error", error=sampled.error)
        if sampled.vector is not None:
            self._finish(seq)
            return Emitted(sampled.seq_id, [], finish_reason="stop", vector=sampled.vector)
        (token,) = sampled.token_ids
        return self._emit(seq, sampled.token_ids, sampled.logprobs, seq.absorb(token))

    def _emit(
        self,
        seq: Sequence,
        tokens: list[int],
        logprobs: list[TokenLogprob] | None,
        reason: FinishReason | None,
    ) -> Emitted:
        if reason is not None:
            self._finish(seq)
        cached, written = seq.tell_reuse()
        return Emitted(
            seq.seq_id,
            tokens,
            logprobs,
            reason,
            tokens[-1] if reason == "stop" else None,
            cached_tokens=cached,
            cache_write_tokens=written,
        )

    # -- memory and order -----------------------------------------------------------------

    def claim(self) -> Claim:
        """What it holds and wants, for `memory.share`."""
        limits, held = self.limits, self.kv_tokens
        each = limits.kv_bytes_per_token
        grown = policy.row_tokens(self.rows, limits, ahead=GROW_AHEAD)
        head = self.queue.peek()
        stay = [seq for seq in self.rows if head is None or not policy.yields(seq, head)]
        if head is None or len(stay) >= self.ceilings.rows:
            first, joined = None, held
        else:
            first = head.order
            joined = policy.row_tokens([*stay, head], limits, ahead=limits.kv_bucket_tokens)
        return Claim(
            kv_bytes=held * each,
            prefix_bytes=self.sharing.held_bytes,
            growth_bytes=max(0, grown - held) * each,
            first=first,
            first_bytes=max(0, joined - held) * each,
        )

    def grant(self, room: Room, *, alone: bool) -> None:
        """What it may hold from the next plan on. `alone`: no other model could use what is spare."""
        self._room = room
        self._alone = alone

    def _bound_prefixes(self) -> None:
        """New blocks take what the rows leave, those that join in this step included."""
        if self._room is not None:
            rows = policy.row_tokens(self.rows, self.limits) * self.limits.kv_bytes_per_token
            self.sharing.bound(self._room.total_bytes - rows)

    @property
    def _slab_tokens(self) -> int | None:
        """Once the plan's blocks are known: what they leave."""
        if self._room is None or not self.limits.kv_bytes_per_token:
            return None
        left = self._room.total_bytes - self.sharing.held_bytes
        return self._tokens(max(0, left)) if self._alone else 0

    def _tokens(self, kv_bytes: int | None) -> int:
        """Row tokens in so many bytes, at most those that its own limit allows."""
        limits = self.limits
        if kv_bytes is None or not limits.kv_bytes_per_token:
            return limits.kv_capacity_tokens
        return min(limits.kv_capacity_tokens, kv_bytes // limits.kv_bytes_per_token)

    def _shed(self) -> None:
        """Preempt until what the rows will hold after this step fits."""
        room = self._tokens(None if self._room is None else self._room.kv_bytes)
        while not policy.fits(self.rows, self.limits, room_tokens=room):
            self._preempt(policy.victim(self.rows))

    def _choose_prefill(
        self, now_s: float
    ) -> tuple[list[tuple[Sequence, int]], list[tuple[Sequence, list[Block]]]]:
        """Chunks for this step, and the sequences that start with it, each with the prefix that it
        copies; best in order first.

        A chunk that no longer fits the budget is passed over, and cut only at what the grain
        allows; only the queue stops at its first sequence that does not fit or awaits a prefix, so
        that no later one overtakes it for good.
        """
        step_size = self.limits.prefill_step_size
        chunks: list[tuple[Sequence, int]] = []
        starts: list[tuple[Sequence, list[Block]]] = []
        ready = [seq for seq in self.rows if seq.prefills and not seq.paused]
        ready.sort(key=_order, reverse=True)
        head = self.queue.peek()
        budget, grain, lone = self._prefill_budget(now_s, ready[-1] if ready else None, head)
        while budget and (ready or head is not None):
            room = None if lone and not chunks else budget
            urgent = _most_urgent(chunks)
            if head is not None and policy.stands_aside(head, urgent, now_s, self.limits):
                head = None
                continue
            if head is None or (ready and ready[-1].order < head.order):
                seq = ready.pop()
                if seq.row is None or policy.stands_aside(seq, urgent, now_s, self.limits):
                    continue
                length = policy.chunk_length(seq.computed, seq.wanted, step_size, room, grain)
            else:
                seq = head
                found = self.sharing.find(seq)
                if found is None:
                    head = None
                    continue
                copied = len(found) * self.sharing.block_tokens
                # Where nothing runs, the pace is that of earlier times.
                pace_s = self.step_s if len(self.rows) else 0.0
                if policy.too_late(seq, copied, now_s, pace_s, self.limits):
                    self._refuse(seq)
                    head = self.queue.peek()
                    continue
                length = policy.chunk_length(copied, seq.wanted, step_size, room, grain)
                if not length or not self._admit(seq, found, now_s):
                    head = None
                    continue
                starts.append((seq, found))
                head = self.queue.peek()
            if length and seq.prefills:
                chunks.append((seq, length))
                budget = max(0, budget - length)
        return chunks, starts

    def _prefill_budget(
        self, now_s: float, running: Sequence | None, waiting: Sequence | None
    ) -> tuple[int, int, bool]:
        """Tokens of prefill in this step, at what multiples of tokens chunks may end to keep to them, and
        whether a longer chunk has a step to itself. `running`, `waiting`: the first of each to prefill."""
        most, grain, lone = self.ceilings.prefill, self.ceilings.grain, self.ceilings.lone
        urgent = any(s is not None and s.priority is Priority.CRITICAL for s in (running, waiting))
        if self.limits.prefill_grain and not urgent and self.vigil.lasts(now_s):
            most, grain, lone = min(most, SHORT_TOKENS), self.limits.prefill_grain, False
        if not (self.limits.max_itl_s and grain):
            return most, grain, lone
        decoding = any(not seq.paused and not seq.prefills for seq in self.rows)
        most = min(most, self.limits.prefill_step_size)
        return self.pace.budget(decoding, most, grain), grain, lone

    def _admit(self, seq: Sequence, found: list[Block], now_s: float) -> bool:
        """Give the queue's first sequence a row, if memory will hold for a bucket's worth of steps;
        who yields to it makes way. Tokens still in flight must arrive first."""
        limits = self.limits
        if seq.inflight:
            return False
        yielding = [other for other in self.rows if policy.yields(other, seq)]
        stay = [other for other in self.rows if other not in yielding]
        if len(stay) >= self.ceilings.rows:
            return False
        room = self._tokens(None if self._room is None else self._room.admit_bytes)
        ahead = limits.kv_bucket_tokens
        if not policy.fits([*stay, seq], limits, ahead=ahead, room_tokens=room):
            return False
        self.queue.pop()
        # Over a ceiling that has fallen, one row is taken over, and no more are ended for it.
        most = max(self.ceilings.rows, len(self.rows))
        while len(self.rows) >= most or not policy.fits(
            [*self.rows, seq], limits, ahead=ahead, room_tokens=room
        ):
            last = policy.victim(yielding)
            yielding.remove(last)
            self._preempt(last)
        self.rows.join(seq)
        self.sharing.begin(seq, found)
        seq.status = Status.RUNNING
        seq.began = len(seq.tokens)
        if seq.admitted_s is None:
            seq.admitted_s = now_s
            seq.cached = min(seq.reused, seq.prompt_len)
        return True

    def _refuse(self, seq: Sequence) -> None:
        self._finish(seq)
        error = DeadlineExceeded("The answer could not have been complete by its deadline.")
        self.refused.append(Emitted(seq.seq_id, [], finish_reason="error", error=error))

    def _preempt(self, seq: Sequence) -> None:
        self.rows.release(seq)
        self._requeue(seq)

    def _requeue(self, seq: Sequence) -> None:
        self.sharing.end(seq)
        seq.forget()
        self.queue.push(seq)
        self.sharing.expect(seq)

    def _finish(self, seq: Sequence) -> None:
        if seq.row is not None:
            self.rows.release(seq)
            self.sharing.end(seq)
        seq.status = Status.FINISHED
        self.held -= seq.held
        self.shares.leave(seq.turn.client)
        del self.sequences[seq.seq_id]

    # -- figures --------------------------------------------------------------------------

    @property
    def running(self) -> int:
        """Sequences that have a row."""
        return len(self.rows)

    @property
    def waiting(self) -> int:
        return len(self.sequences) - len(self.rows)

    @property
    def steps_in_flight(self) -> int:
        return len(self.launched)

    @property
    def kv_tokens(self) -> int:
        """KV tokens that the rows hold."""
        limits = self.limits
        lengths = [seq.computed for seq in self.rows]
        return held(lengths, limits.kv_bucket_tokens, own=limits.kv_own_rows)

    @property
    def kv_capacity_tokens(self) -> int:
        return self.limits.kv_capacity_tokens

    @property
    def has_work(self) -> bool:
        """Something to compute, deliver, free, or write to disk. With no step in flight, `schedule` then
        has a plan, or finds that there was nothing left to write."""
        if self.launched or self.rows.unsettled or len(self.sequences) > self.held:
            return True
        return self.sharing.disk.behind


def _most_urgent(chunks: list[tuple[Sequence, int]]) -> Priority:
    return min((seq.priority for seq, _ in chunks), default=Priority.LOW)


def _order(seq: Sequence) -> tuple[int, int]:
    return seq.order
