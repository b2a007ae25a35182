"""Runs sequences through the real scheduler and a runner, a few steps deep."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_serving.errors import MLXServingError
from mlx_serving.runtime.backend.arch import head_on_last, make_store
from mlx_serving.runtime.backend.kv_layers import KVLayer, MakeKVLayer
from mlx_serving.runtime.backend.runner import MLXRunner
from mlx_serving.runtime.backend.sampler import Sampler
from mlx_serving.runtime.backend.space import Space
from mlx_serving.runtime.core.plan import Constraint, Limits, PendingStep, Runner, StepPlan
from mlx_serving.runtime.core.scheduler import Emitted, Scheduler
from mlx_serving.runtime.core.sequence import Sequence
from mlx_serving.types import FinishReason, SamplingParams, TokenLogprob

BUCKET = 16
ROW_TOKENS = 512 + BUCKET
TOKEN_BYTES = 16 * 1024
"""More than any of the small models' takes."""


def make_runner(
    model: Any,
    vocab: int,
    *,
    rows: int = 4,
    exact_batch: bool = False,
    eos: tuple[int, ...] = (),
    attention: MakeKVLayer = KVLayer,
    in_place: bool = False,
    foresight: bool = False,
    space: Space | None = None,
) -> MLXRunner:
    """A runner with small buckets, so that short sequences make slabs grow; in a `space` they have their
    size from the start."""
    store = make_store(
        model,
        model.model_type,
        rows,
        bucket=BUCKET,
        exact_batch=exact_batch,
        attention=attention,
        in_place=in_place,
    )
    if space is not None:
        store.reserve(space, ROW_TOKENS, TOKEN_BYTES)
    return MLXRunner(
        model,
        store,
        Sampler(vocab, eos, rows),
        max_rows=rows,
        backbone=head_on_last(model),
        exact_batch=exact_batch,
        foresight=foresight,
    )


@dataclass(frozen=True)
class Job:
    """One sequence: when it joins, counted in steps, and when it is cancelled or paused if ever."""

    prompt: tuple[int, ...]
    sampling: SamplingParams
    joins: int = 0
    leaves: int | None = None
    pauses: range = range(0)
    constraint: Constraint | None = None
    output: tuple[int, ...] = ()
    """What was already generated, where it is resumed."""
    adapter: str | None = None
    """A `LoadedAdapter.tag`."""


@dataclass
class Outcome:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reason: FinishReason | None = None
    error: MLXServingError | None = None


@dataclass
class Run:
    outcomes: dict[int, Outcome]
    plans: list[StepPlan]

    def moves(self) -> int:
        return sum(len(plan.moves) for plan in self.plans)

    def forced(self) -> int:
        return sum(plan.forced_tokens for plan in self.plans)

    def take(self, emitted: Iterable[Emitted]) -> None:
        for one in emitted:
            outcome = self.outcomes[one.seq_id]
            outcome.tokens += one.token_ids
            outcome.logprobs += one.logprobs or []
            outcome.reason = one.finish_reason
            outcome.error = one.error


def run(
    runner: Runner,
    jobs: Iterable[Job] | Mapping[int, Job],
    *,
    rows: int = 4,
    prefill_step: int = 16,
    depth: int = 1,
    capacity_tokens: int = 4096,
    eos: tuple[int, ...] = (),
) -> Run:
    """Until every job has ended. Outcomes are keyed by the job's place, or its key."""
    jobs = dict(jobs) if isinstance(jobs, Mapping) else dict(enumerate(jobs))
    limits = Limits(
        max_num_seqs=rows,
        prefill_step_size=prefill_step,
        context_length=512,
        kv_capacity_tokens=capacity_tokens,
        kv_bucket_tokens=BUCKET,
        eos_token_ids=eos,
    )
    scheduler = Scheduler(limits)
    done = Run({key: Outcome() for key in jobs}, [])
    pending: deque[PendingStep] = deque()
    for step in range(2000):
        for key, job in jobs.items():
            _wishes(scheduler, key, job, step)
        plan = None
        if len(pending) < depth:
            done.take(scheduler.foresee(runner.foresee()))
            plan = scheduler.schedule(float(step))
        if plan is not None:
            done.plans.append(plan)
            pending.append(runner.launch(plan))
        if pending and (len(pending) >= depth or plan is None):
            done.take(scheduler.apply(pending.popleft().wait()))
        started = all(job.joins <= step for job in jobs.values())
        if started and not pending and not scheduler.has_work and not scheduler.sequences:
            return done
    raise AssertionError("the jobs never ended")


def _wishes(scheduler: Scheduler, key: int, job: Job, step: int) -> None:
    if job.joins == step:
        scheduler.add(
            Sequence(
                seq_id=key,
                tokens=[*job.prompt, *job.output],
                prompt_len=len(job.prompt),
                sampling=job.sampling,
                constraint=job.constraint,
                adapter=job.adapter,
            )
        )
    if job.leaves == step:
        scheduler.cancel(key)
    if job.pauses and step == job.pauses.start:
        scheduler.pause(key)
    if job.pauses and step == job.pauses.stop:
        scheduler.resume(key)
