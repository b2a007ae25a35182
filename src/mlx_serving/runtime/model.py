"""One loaded model in the loop: what came for it goes in, a step's rows come out."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from mlx_serving import clock, errors
from mlx_serving.runtime.backend.model import LoadedAdapter, LoadedModel
from mlx_serving.runtime.compiles import Compiles
from mlx_serving.runtime.core.plan import Constraint, StepPlan
from mlx_serving.runtime.core.scheduler import Emitted, Scheduler
from mlx_serving.runtime.core.sequence import Sequence
from mlx_serving.runtime.faults import Drag
from mlx_serving.runtime.line import Launched, Line
from mlx_serving.runtime.slices import Slices
from mlx_serving.runtime.stages import Stages
from mlx_serving.types import CacheStats, Grammar, Prepared
from mlx_serving.worker import wire

log = logging.getLogger(__name__)


class Model:
    """One loaded model: its scheduler, its runner, and the steps in flight between them."""

    def __init__(
        self,
        loaded: LoadedModel,
        depth: int,
        now: clock.Clock = clock.monotonic,
        on_start: Callable[[list[int]], None] = lambda _: None,
        arrivals: Iterator[int] | None = None,
        slow_step_ms: float = 0.0,
        line: Line | None = None,
        *,
        compiles: Compiles,
        unprepared: Collection[Prepared] = (),
    ) -> None:
        self.info = loaded.info
        self.drag = Drag(slow_step_ms / 1e3, now)
        self._on_start = on_start
        self.sequences: set[int] = set()
        """Those that have not ended."""
        self._runner = loaded.runner
        self._limits = loaded.limits
        self._scheduler = Scheduler(loaded.limits, loaded.on_disk, arrivals)
        self.claim, self.grant = self._scheduler.claim, self._scheduler.grant
        self.close = loaded.close
        self.weights = loaded.weights
        self._grammars = loaded.grammars
        self._compiles = compiles
        self._unprepared = frozenset(unprepared)
        self._host = loaded.adapters
        self.adapters: dict[str, LoadedAdapter] = {}
        """By the names that requests have for them."""
        self._depth = max(1, depth)
        self._line = line or Line(now)
        self._in_flight: deque[Launched] = deque()
        self._started: set[int] = set()
        self._now = now
        self._last_done_s = 0.0
        self._pace_told = False
        self.lacks_memory = False
        self._stages = Stages(now)
        self._cache_told: CacheStats | None = None
        self._early: list[wire.TokenRow] = []
        """Rows that no step had to be waited for."""

    @property
    def held_bytes(self) -> int:
        """Its weights, and its adapters'."""
        return self.info.held_bytes + sum(a.info.held_bytes for a in self.adapters.values())

    def attach(self, model_id: str, path: Path) -> Slices[LoadedAdapter]:
        """Load an adapter, which answers under a name of its own. Raises ModelBroken."""
        if self._host is None:
            raise errors.ModelBroken(f"'{self.info.model_id}' takes no adapters: it writes no text")
        return self._host.load(model_id, path, self.info)

    def detach(self, model_id: str) -> wire.Step:
        """Let go of an adapter; error rows for the sequences that run with it."""
        tag = self.adapters.pop(model_id).tag
        ended = [i for i in sorted(self.sequences) if self._scheduler.sequences[i].adapter == tag]
        for seq_id in ended:
            self._scheduler.cancel(seq_id)
        assert self._host is not None
        self._host.unload(tag)
        code, message = errors.ModelNotFound.code, f"model {model_id!r} was unloaded"
        return wire.Step([self._error_row(seq_id, code, message) for seq_id in ended])

    def submit(self, request: wire.Submit) -> None:
        """Raises what the scheduler raises for a sequence that cannot ever run, and UnsupportedParameter
        for a grammar where the model has none. One that is not compiled yet is compiled meanwhile."""
        compiler, grammar = self._grammars, request.grammar
        constraint = None if grammar is None else self._known(grammar)
        adapter = self.adapters.get(request.model_id)
        sequence = Sequence(
            seq_id=request.seq_id,
            tokens=request.token_ids,
            prompt_len=request.prompt_len,
            sampling=request.sampling,
            priority=request.priority,
            constraint=constraint,
            compiling=grammar is not None and constraint is None,
            salt=request.cache_salt,
            pooled=request.pooled or self.info.kind != "decoder",
            second_at=request.second_at,
            turn=request.turn,
            adapter=None if adapter is None else adapter.tag,
        )
        self._scheduler.add(sequence, self._now())
        self.sequences.add(request.seq_id)
        if "hash" not in self._unprepared:
            with self._stages.measure("hash"):
                self._scheduler.sharing.hash(sequence)
        self._stages.queued(request.seq_id)
        if sequence.compiling:
            assert compiler is not None and grammar is not None
            self._stages.compiling(request.seq_id)
            self._compiles.ask(request.seq_id, compiler, grammar)

    def _known(self, grammar: Grammar) -> Constraint | None:
        """What need not wait. Raises UnsupportedParameter."""
        if self._grammars is None:
            raise errors.UnsupportedParameter(
                f"model '{self.info.model_id}' has no structured output", param=grammar.param
            )
        since_s = self._now()
        here = "grammar" in self._unprepared
        found = self._grammars.compile(grammar) if here else self._grammars.known(grammar)
        if found is not None:
            self._stages.took("grammar", since_s)
        return found

    def compiled(self, seq_id: int, outcome: Constraint | BaseException) -> None:
        """What came of compiling a sequence's grammar. One that cannot be followed ends it, with an
        error row that the next step tells."""
        if isinstance(outcome, BaseException):
            self._scheduler.cancel(seq_id)
            self._early.append(self._error_row(seq_id, *reason_of(outcome, "internal_error")))
        else:
            self._stages.compiled(seq_id)
            self._scheduler.provide(seq_id, outcome)

    def cancel(self, seq_id: int) -> None:
        self._forget(seq_id)
        self._scheduler.cancel(seq_id)

    def pause(self, seq_id: int) -> None:
        self._scheduler.pause(seq_id)

    def resume(self, seq_id: int) -> None:
        self._scheduler.resume(seq_id)

    def tune(self, tuning: wire.Tune) -> None:
        self._scheduler.tune(tuning.max_num_seqs, tuning.prefill_tokens)

    def take_turns(self, turns: wire.Turns) -> None:
        limits, wait_s, short_first = self._limits, turns.max_wait_s, turns.short_jobs_first
        self._scheduler.take_turns(
            limits.max_wait_s if wait_s is None else wait_s,
            limits.short_jobs_first if short_first is None else short_first,
        )

    @property
    def has_work(self) -> bool:
        """Something to compute, not only sequences that are held."""
        return self._scheduler.has_work

    def step(self) -> wire.Step | None:
        """Launch what the pipeline has room for, then wait for the oldest step in flight.

        None: nothing to compute until a message changes something. A step that fails ends the
        sequences that had begun, with an error row each; those still waiting stay.
        """
        try:
            while len(self._in_flight) < self._scheduler.depth(self._depth, self._now()):
                self._early += self._rows(self._scheduler.foresee(self._runner.foresee()))
                plan = self._scheduler.schedule(self._now())
                if plan is None:
                    break
                if plan.starts:
                    starts = [start.seq_id for start in plan.starts]
                    self._started.update(starts)
                    self._note_starts(starts)
                    self._on_start(starts)
                self._in_flight.append(self._line.join(plan, self._runner.launch(plan)))
            if not self._in_flight:
                early = self._take_early()
                return wire.Step(early) if early else None
            oldest = self._in_flight.popleft()
            emitted = self._scheduler.apply(self._line.wait(oldest))
            rows = self._take_early() + self._rows(emitted)
            stats = self._stats(oldest)
            self._scheduler.observe(oldest.plan, stats.step_ms / 1e3)
            self._tell_of_pace()
            return wire.Step(rows, stats)
        except Exception as error:
            log.exception("%s: step failed", self.info.model_id)
            return self._fail_started(error)

    def _note_starts(self, seq_ids: list[int]) -> None:
        for seq_id in seq_ids:
            seq = self._scheduler.sequences[seq_id]
            self._stages.started(seq_id, seq.disk_since_s)

    def _tell_of_pace(self) -> None:
        """Once: the target for gaps is not to be had on this machine."""
        pace = self._scheduler.pace
        if pace.out_of_reach and not self._pace_told:
            self._pace_told = True
            log.warning(
                "%s: max_itl_ms %.0f is out of reach: a step that decodes beside the shortest chunk "
                "of a prompt takes about %.0f ms",
                self.info.model_id,
                pace.max_itl_s * 1e3,
                pace.least_s * 1e3,
            )

    def _take_early(self) -> list[wire.TokenRow]:
        early, self._early = self._early, []
        refused, self._scheduler.refused = self._scheduler.refused, []
        return early + self._rows(refused)

    def end_all(self, code: str, message: str) -> wire.Step:
        """Error rows for every sequence; the model is not stepped again."""
        self._leave_line()
        rows = self._take_early()
        rows += [self._error_row(seq_id, code, message) for seq_id in sorted(self.sequences)]
        return wire.Step(rows)

    def _rows(self, emitted: list[Emitted]) -> list[wire.TokenRow]:
        rows = []
        for e in emitted:
            if e.error is not None and e.seq_id in self.sequences:
                rows.append(self._error_row(e.seq_id, *reason_of(e.error, e.error.code)))
            elif e.seq_id in self.sequences:
                self._stages.first_token(e.seq_id)
                rows.append(
                    wire.TokenRow(
                        e.seq_id,
                        e.token_ids,
                        e.logprobs,
                        e.finish_reason,
                        e.stop_token_id,
                        cached_tokens=e.cached_tokens,
                        cache_write_tokens=e.cache_write_tokens,
                        vector=e.vector,
                    )
                )
                if e.finish_reason is not None:
                    self._forget(e.seq_id)
        return rows

    def _stats(self, step: Launched | None) -> wire.StepStats:
        """A step's time runs from its launch, or from the end of the model's step before it. None:
        one that failed."""
        now = self._now()
        began_s = max(step.at_s if step else now, self._last_done_s)
        self._last_done_s = now
        plan = step.plan if step else StepPlan(step_id=-1)
        return wire.StepStats(
            model_id=self.info.model_id,
            decode_rows=len(plan.decode),
            prefill_tokens=plan.prefill_tokens,
            forced_tokens=plan.forced_tokens,
            running=self._scheduler.running,
            waiting=self._scheduler.waiting,
            step_ms=(now - began_s) * 1e3,
            kv_tokens=self._scheduler.kv_tokens,
            kv_capacity_tokens=self._scheduler.kv_capacity_tokens,
            cache=self._news_of_cache(),
            own_ms=step.own_s * 1e3 if step else 0.0,
            stages=self._stages.take(),
            lacks_memory=self.lacks_memory,
        )

    def _news_of_cache(self) -> CacheStats | None:
        stats = self._scheduler.cache_stats()
        if stats == self._cache_told:
            return None
        self._cache_told = stats
        return stats

    def clear_cache(self) -> CacheStats:
        self._scheduler.clear_cache()
        return self._scheduler.cache_stats()

    def _fail_started(self, error: Exception) -> wire.Step:
        """Nothing that the failed step or those behind it have computed is kept."""
        code, message, _ = reason_of(error, "step_failed")
        rows = self._take_early()
        for seq_id in sorted(self._started):
            self._scheduler.cancel(seq_id)
            rows.append(self._error_row(seq_id, code, message))
        self._leave_line()
        self._scheduler.reset()
        self._runner.reset()
        return wire.Step(rows, self._stats(None))

    def _leave_line(self) -> None:
        self._line.leave(self._in_flight)
        self._in_flight.clear()

    def _error_row(
        self, seq_id: int, code: str, message: str, param: str | None = None
    ) -> wire.TokenRow:
        self._forget(seq_id)
        return error_row(seq_id, code, message, param)

    def _forget(self, seq_id: int) -> None:
        self.sequences.discard(seq_id)
        self._started.discard(seq_id)
        self._compiles.forget(seq_id)
        self._stages.forget(seq_id)


def error_row(seq_id: int, code: str, message: str, param: str | None = None) -> wire.TokenRow:
    return wire.TokenRow(
        seq_id, [], finish_reason="error", error=(code, message), error_param=param
    )


def reason_of(error: BaseException, code: str) -> tuple[str, str, str | None]:
    """(code, message, field at fault)."""
    if isinstance(error, errors.MLXServingError):
        return error.code, error.message, error.param
    return code, f"{type(error).__name__}: {error}", None
