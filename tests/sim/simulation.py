"""The real scheduler under a virtual clock and one seed.

Everything random comes from the seed: limits, requests, cancels, pauses, worker deaths, failed
steps, and how launches and deliveries interleave. Invariants are checked after every call; each
token is compared, as it arrives, with what the request generates alone.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Iterable

from mlx_serving.errors import ContextOverflow, DeadlineExceeded
from mlx_serving.runtime.core import invariants
from mlx_serving.runtime.core.memory import Room
from mlx_serving.runtime.core.plan import Matcher, PendingStep, StepPlan
from mlx_serving.runtime.core.policy import usable_context
from mlx_serving.runtime.core.scheduler import Emitted, Scheduler
from mlx_serving.runtime.core.sequence import Sequence, Status
from mlx_serving.types import Priority
from sim.brief import brief
from sim.fake_disk import FakeDisk
from sim.fake_runner import FakeRunner
from sim.report import Report
from sim.scenario import Request, alone, scenario


class AnyToken:
    """A constraint that the fake runner does not look at."""

    def matcher(self, output: Iterable[int]) -> Matcher:
        raise NotImplementedError


class Simulation:
    def __init__(
        self, seed: int, log: Callable[[str], None] | None = None, *, crowded: bool = True
    ) -> None:
        self.scenario = scenario(seed, crowded=crowded)
        self.limits = self.scenario.limits
        self.report = Report(seed)
        self._log = log or (lambda line: None)
        self._rng = random.Random(seed ^ 0x5EED)
        self._now_s = 0.0
        self._disk = FakeDisk(self.limits, random.Random(seed ^ 0xD15C), self.scenario.disk_faults)
        self._salts = {r.seq_id: r.salt for r in self.scenario.requests}
        self._start_worker()
        self._cached: dict[int, int] = {}
        """Prompt tokens copied at first: what its first tokens have to tell."""
        self._pending: deque[tuple[StepPlan, PendingStep]] = deque()
        self._last_admission = -(10**9)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._planned = itertools.count()
        self._requests = {r.seq_id: r for r in self.scenario.requests}
        self._oracles = {
            r.seq_id: alone(r, self.limits)
            for r in self.scenario.requests
            if len(r.prompt) < usable_context(self.limits)
        }
        self._pressed = False
        self._room: Room | None = None
        self._plan_events()

    def run(self) -> Report:
        """Raises AssertionError on the first thing that is wrong."""
        self._log(f"{self.limits} depth={self.scenario.depth}")
        while True:
            while self._events and self._events[0][0] <= self._now_s:
                heapq.heappop(self._events)[2]()
                invariants.check(self._scheduler)
            if self._scheduler.has_work and not self._starved():
                self._step()
                invariants.check(self._scheduler)
            elif self._events:
                self._now_s = self._events[0][0]
            else:
                break
        self._check_end()
        return self.report

    # -- the worker's loop, its interleaving drawn ------------------------------------------

    def _step(self) -> None:
        self._now_s += self._rng.expovariate(1.0)
        refused = self.report.refused
        room = len(self._pending) < self._scheduler.depth(self.scenario.depth, self._now_s)
        if room and (not self._pending or self._rng.random() < 0.7) and self._launch():
            return
        done = self.report.refused > refused or not self._scheduler.has_work
        if not self._pending and done:
            return  # what was left was refused, or nothing was left to write
        assert self._pending, "stuck: there is work, no step in flight, and no plan"
        self._deliver()

    def _launch(self) -> bool:
        scheduler = self._scheduler
        before = list(scheduler.rows)
        self._orders = {seq: seq.order for seq in before}
        pool_bytes = scheduler.sharing.held_bytes
        for one in scheduler.foresee(self._runner.foresee()):
            self.report.foreseen += len(one.token_ids)
            self._receive(one)
        plan = scheduler.schedule(self._now_s)
        if plan is not None:
            self._observe(plan, before)
        self._take_refused()
        if plan is None:
            return False
        if self._room is not None:
            invariants.check_room(scheduler, self._room, pool_bytes)
        self._pending.append((plan, self._runner.launch(plan)))
        self.report.deepest = max(self.report.deepest, len(self._pending))
        return True

    def _observe(self, plan: StepPlan, before: list[Sequence]) -> None:
        report, scheduler = self.report, self._scheduler
        self._log(f"{self._now_s:8.1f} launch {brief(plan)}")
        lost = [seq for seq in before if seq.status is Status.WAITING]
        starters = [scheduler.sequences[start.seq_id] for start in plan.starts]
        outranked = [
            seq
            for seq in lost
            if not (seq.paused or seq.promoted)
            and any(seq.priority >= starter.priority + 2 for starter in starters)
        ]
        grown = [seq for seq in lost if not seq.paused and seq not in outranked]
        report.evictions += len(lost) - len(grown) - len(outranked)
        report.preemptions += len(grown)
        report.outranked += len(outranked)
        report.disturbances += bool(outranked)
        report.promoted += sum(starter.promoted for starter in starters)
        if grown:
            since = report.steps + report.foreseen - self._last_admission
            assert since > self.limits.kv_bucket_tokens, f"thrash: {since} steps after admission"
            stayed = [q for q in before if q.status is Status.RUNNING and q not in starters]
            assert all(self._orders[q] < self._orders[seq] for q in stayed for seq in grown)
        worked = {work.seq_id for work in (*plan.prefill, *plan.decode)}
        assert not any(scheduler.sequences[i].paused for i in worked), "a paused row works"
        assert worked.issuperset(s.seq_id for s in plan.starts), "a row is taken to stay idle"
        self._observe_sharing(plan)
        if plan.starts:
            self._last_admission = report.steps + report.foreseen
            self._check_order([seq for seq in starters if not seq.promoted], lost)
        report.steps += bool(plan.prefill or plan.decode or plan.frees)
        report.forced += plan.forced_tokens

    def _check_order(self, admitted: list[Sequence], lost: list[Sequence]) -> None:
        """By class and, where no client or length is preferred, by arrival. Who waits because it `lost`
        its row in this very plan had not been overtaken."""
        head = self._scheduler.queue.peek()
        if head is not None and not head.promoted and head not in lost:
            admitted = [*admitted, head]
        ranks = [(seq.priority, seq.rank, seq.arrival) for seq in admitted]
        if len({request.turn.client for request in self.scenario.requests}) > 1:
            ranks = [(seq.priority, 0, 0) for seq in admitted]
        assert ranks == sorted(ranks), "somebody was overtaken"

    def _observe_sharing(self, plan: StepPlan) -> None:
        report, scheduler = self.report, self._scheduler
        for start in plan.starts:
            constrained = self._requests[start.seq_id].compiles_s is not None
            assert (start.constraint is not None) == constrained, "begun without its grammar"
            report.reused += start.reused
            self._cached.setdefault(start.seq_id, min(start.reused, start.prompt_len))
        report.published += sum(len(publish.blocks) for publish in plan.publish)
        head = scheduler.queue.peek()
        report.awaited += head is not None and scheduler.sharing.find(head) is None

    def _take_refused(self) -> None:
        for refused in self._scheduler.refused:
            request = self._requests[refused.seq_id]
            assert request.live and not request.tokens, "what had begun was refused"
            assert isinstance(refused.error, DeadlineExceeded)
            request.refused = True
            self.report.refused += 1
            self._log(f"{self._now_s:8.1f} refuse {refused.seq_id}")
        self._scheduler.refused.clear()

    def _deliver(self) -> None:
        plan, pending = self._pending.popleft()
        result = pending.wait()
        emitted = self._scheduler.apply(result)
        self._scheduler.observe(plan, self._rng.choice([0.0, 0.1, 3.0]))
        self.report.discarded += len(result.sampled) - len(emitted)
        for one in emitted:
            self._receive(one)

    def _receive(self, got: Emitted) -> None:
        request, oracle = self._requests[got.seq_id], self._oracles[got.seq_id]
        self._log(
            f"{self._now_s:8.1f}   {got.seq_id} gets {got.token_ids} {got.finish_reason or ''}"
        )
        assert request.live, f"{got.seq_id} has ended or was cancelled, and is sent more"
        assert got.token_ids and got.cached_tokens + got.cache_write_tokens <= len(request.prompt)
        assert got.cached_tokens == self._cached[got.seq_id], f"{got.seq_id} was not told"
        self._cached[got.seq_id] = 0
        assert (got.logprobs is None) == (request.sampling.logprobs is None)
        request.tokens += got.token_ids
        request.logprobs += got.logprobs or []
        self.report.tokens += len(got.token_ids)
        assert request.tokens == oracle.tokens[: len(request.tokens)], f"{got.seq_id} diverges"
        if got.finish_reason is not None:
            request.endings.append((got.finish_reason, got.stop_token_id))

    # -- what clients and fate do -------------------------------------------------------------

    def _plan_events(self) -> None:
        for request in self.scenario.requests:
            self._at(request.arrives_s, lambda r=request: self._submit(r))
            if request.cancels_s is not None:
                self._at(request.cancels_s, lambda r=request: self._cancel(r))
            for stalls_s, goes_on_s in request.pauses_s:
                self._at(stalls_s, lambda r=request: self._pause(r, True))
                self._at(goes_on_s, lambda r=request: self._pause(r, False))
        for at_s in self.scenario.deaths_s:
            self._at(at_s, self._die)
        for from_s, until_s in self.scenario.pressures_s:
            self._at(from_s, lambda: self._press(True))
            self._at(until_s, lambda: self._press(False))
        for at_s in self.scenario.failures_s:
            self._at(at_s, self._fail)
        for at_s in self.scenario.disk_losses_s:
            self._at(at_s, self._disk.delete_all)

    def _at(self, at_s: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at_s, next(self._planned), event))

    def _submit(self, request: Request) -> None:
        request.submitted = True
        oracle = self._oracles.get(request.seq_id)
        try:
            self._add(request)
        except ContextOverflow:
            assert oracle is None, f"{request.seq_id} is rejected and would fit"
            request.rejected = True
            self.report.rejected += 1
        else:
            assert oracle is not None, f"{request.seq_id} is accepted and can never fit"
            step = self.limits.prefill_grain or self.limits.prefill_step_size
            chunks = -(-len(request.prompt) // step)
            self.report.work += chunks + len(oracle.tokens)
        self._log(f"{self._now_s:8.1f} submit {request.seq_id} {request.priority.name}")

    def _add(self, request: Request, priority: Priority | None = None) -> None:
        scheduler = self._scheduler
        scheduler.add(
            Sequence(
                seq_id=request.seq_id,
                tokens=request.prompt + request.tokens,
                prompt_len=len(request.prompt),
                sampling=request.sampling,
                priority=request.priority if priority is None else priority,
                salt=request.salt,
                turn=request.turn,
                compiling=request.compiles_s is not None,
            ),
            self._now_s,
        )
        if request.compiles_s is not None:
            at_s = self._now_s + request.compiles_s
            self._at(at_s, lambda: self._compiled(request, scheduler))

    def _compiled(self, request: Request, scheduler: Scheduler) -> None:
        """Of a worker that may be no more, for a request that may have ended."""
        if scheduler is not self._scheduler or not request.live:
            return
        if request.malformed:
            self.report.malformed += 1
            request.refused = True
            assert not request.tokens and scheduler.cancel(request.seq_id)
        else:
            self.report.compiled += 1
            scheduler.provide(request.seq_id, AnyToken())
        self._log(f"{self._now_s:8.1f} compiled {request.seq_id} {request.malformed=}")

    def _cancel(self, request: Request) -> None:
        live = request.live
        assert self._scheduler.cancel(request.seq_id) == live
        request.cancelled = live
        self.report.cancelled += live
        self._log(f"{self._now_s:8.1f} cancel {request.seq_id}")

    def _pause(self, request: Request, paused: bool) -> None:
        request.paused = paused
        self.report.disturbances += paused and request.live
        act = self._scheduler.pause if paused else self._scheduler.resume
        act(request.seq_id)
        self._log(f"{self._now_s:8.1f} {'pause' if paused else 'resume'} {request.seq_id}")

    def _press(self, pressed: bool) -> None:
        """Other models take a part of the memory, or all of it; or they give it back."""
        limits, rng = self.limits, self._rng
        self._pressed = pressed
        kv = limits.kv_capacity_tokens
        prefix = limits.prefix_blocks * limits.prefix_block_bytes
        if pressed:
            kv, prefix = rng.choice([0, kv // 4, kv // 2]), rng.choice([0, prefix // 3])
            self.report.pressures += 1
            self.report.disturbances += len(self._scheduler.rows)
        self._last_admission = -(10**9)
        self._room = Room(kv, kv, prefix, kv + prefix)
        self._scheduler.grant(self._room, alone=True)
        self._log(f"{self._now_s:8.1f} room for {kv} tokens, {prefix} bytes of prefixes")

    def _starved(self) -> bool:
        """Nobody can do anything before others give memory back."""
        return self._pressed and not self._pending and not self._launch()

    def _die(self) -> None:
        """A new worker: clients resubmit, each with the tokens it has got."""
        self._log(f"{self._now_s:8.1f} worker dies")
        self.report.deaths += 1
        self.report.disturbances += 1
        self._begin_anew()
        for request in sorted(self._requests.values(), key=lambda r: r.arrives_s):
            if request.live:
                self._add(request)
                if request.paused:
                    self._scheduler.pause(request.seq_id)

    def _start_worker(self) -> None:
        self._scheduler = Scheduler(self.limits, self._disk.scan())
        self._runner = FakeRunner(self.limits, self._rng, self._salts, self._disk)

    def _begin_anew(self) -> None:
        self._pending.clear()
        self._cached.clear()
        self.report.dropped += self._scheduler.sharing.index.evictions
        self._count_disk()
        self._disk.begin_anew()
        self._start_worker()
        self._room = None
        self._last_admission = -(10**9)

    def _fail(self) -> None:
        self._log(f"{self._now_s:8.1f} step fails")
        self.report.disturbances += 1
        self._pending.clear()
        self._runner.reset()
        self._scheduler.reset()

    def _count_disk(self) -> None:
        counts, report = self._scheduler.sharing.disk.counts, self.report
        report.disk_read += counts.read
        report.disk_written += counts.written
        report.disk_lost += counts.lost
        report.disk_not_written += counts.not_written
        report.disk_evicted += counts.evicted
        report.disk_late += counts.late

    # -- at the end -------------------------------------------------------------------------

    def _check_end(self) -> None:
        assert not self._scheduler.sequences, "somebody was left behind"
        assert not any(b.holders for b in self._scheduler.sharing.index.blocks.values())
        self.report.dropped += self._scheduler.sharing.index.evictions
        self._count_disk()
        assert not self._scheduler.rows.slots and not self._runner.rows, "a row leaked"
        for request in self._requests.values():
            if request.rejected or request.cancelled or request.refused:
                assert not request.endings
                continue
            oracle = self._oracles[request.seq_id]
            assert request.endings == [oracle.ending], f"{request.seq_id}: {request.endings}"
            assert request.tokens == oracle.tokens
            if request.sampling.logprobs is not None:
                assert request.logprobs == oracle.logprobs
        bound = self.report.work * (2 + self.report.disturbances) + 2 * len(self._requests)
        assert self.report.steps <= bound, f"{self.report.steps} steps where {bound} suffice"
