"""What clients ask for and what goes wrong meanwhile, drawn from one seed."""

from __future__ import annotations

import dataclasses
import math
import random
from dataclasses import dataclass, field

from mlx_serving.runtime.core.disk import STAGED_BYTES
from mlx_serving.runtime.core.plan import Limits
from mlx_serving.runtime.core.policy import usable_context
from mlx_serving.runtime.core.rows import bucketed
from mlx_serving.types import FinishReason, Priority, SamplingParams, TokenLogprob, Turn
from sim.fake_runner import VOCAB, next_token


@dataclass(slots=True)
class Request:
    """What a client asks for and does, and what it got."""

    seq_id: int
    prompt: list[int]
    sampling: SamplingParams
    priority: Priority
    arrives_s: float
    cancels_s: float | None
    pauses_s: list[tuple[float, float]]
    """When its reader stalls, and when it goes on."""
    salt: str | None = None
    turn: Turn = field(default_factory=Turn)
    compiles_s: float | None = None
    """How long its grammar takes to compile, in every worker; None: it has none."""
    malformed: bool = False
    """Its grammar turns out to be none."""

    submitted: bool = False
    rejected: bool = False
    cancelled: bool = False
    refused: bool = False
    """It was not begun: it could not have ended by its deadline, or its grammar is none."""
    paused: bool = False
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    endings: list[tuple[FinishReason, int | None]] = field(default_factory=list)
    starting: bool = False
    deaths: int = 0
    """These two are `worker.blame`'s."""

    @property
    def live(self) -> bool:
        return self.submitted and not (
            self.rejected or self.cancelled or self.refused or self.endings
        )


@dataclass(slots=True)
class Oracle:
    """What the request generates alone: no scheduler, no rows, no steps."""

    tokens: list[int]
    logprobs: list[TokenLogprob]
    ending: tuple[FinishReason, int | None]


def alone(request: Request, limits: Limits) -> Oracle:
    sampling, eos = request.sampling, limits.eos_token_ids
    stops = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else eos)}
    prefix, logprobs = list(request.prompt), []
    while True:
        token, logprob = next_token(prefix, len(request.prompt), sampling, eos)
        prefix.append(token)
        logprobs.append(logprob)
        generated = prefix[len(request.prompt) :]
        if token in stops:
            return Oracle(generated, logprobs, ("stop", token))
        if len(generated) == sampling.max_tokens or len(prefix) == usable_context(limits):
            return Oracle(generated, logprobs, ("length", None))


@dataclass(slots=True)
class Scenario:
    limits: Limits
    depth: int
    requests: list[Request]
    deaths_s: list[float]
    """When the worker dies: all rows are lost, clients resubmit with what they have."""
    failures_s: list[float]
    pressures_s: list[tuple[float, float]] = field(default_factory=list)
    """When other models take memory, and give it back."""
    """When a step fails inside the worker: rows are lost, the scheduler is reset."""
    disk_faults: float = 0.0
    """How often a read of a block file fails; writes fail less often."""
    disk_losses_s: list[float] = field(default_factory=list)
    """When all block files are deleted."""


def scenario(seed: int, *, crowded: bool = True) -> Scenario:
    rng = random.Random(seed)
    context = rng.choice([12, 40, 100, 200])
    bucket = rng.choice([4, 8, 16])
    rows = rng.choice([1, 2, 3, 4, 8, 16])
    roomy = rows * bucketed(context, bucket)
    tight = rng.randint(max(2 * bucket, context // 3), 3 * context)
    limits = Limits(
        max_num_seqs=rows,
        prefill_step_size=rng.choice([1, 3, 8, 16, 64]),
        context_length=context,
        kv_capacity_tokens=rng.choice([roomy, tight, tight]),
        kv_bucket_tokens=bucket,
        kv_own_rows=random.Random(seed ^ 0x0A7).random() < 0.5,
        eos_token_ids=rng.choice([(), (0,), (0, 1)]),
    )
    horizon_s = rng.choice([1.0, 30.0, 100.0])
    count = rng.choice([rng.randint(1, 4), rng.randint(10, 30)])
    plain = Scenario(
        limits,
        depth=rng.randint(1, 3),
        requests=[_request(rng, i, context, horizon_s) for i in range(count)],
        deaths_s=[rng.uniform(0, 2 * horizon_s) for _ in range(rng.choice([0, 0, 1, 2]))],
        failures_s=[rng.uniform(0, 2 * horizon_s) for _ in range(rng.choice([0, 0, 1]))],
    )
    _with_grammars(plain, random.Random(seed ^ 0x6A14))
    shared = _sharing(plain, random.Random(~seed))
    return _crowded(shared, random.Random(seed ^ 0xC201)) if crowded else shared


def _crowded(plain: Scenario, rng: random.Random) -> Scenario:
    """The same with several clients, deadlines, ageing and a liking for short jobs, each or none."""
    limits = dataclasses.replace(
        plain.limits,
        max_wait_s=rng.choice([math.inf, 5.0, 50.0]),
        short_jobs_first=rng.random() < 0.3,
    )
    clients = [None, "a", "b", "c"][: rng.randint(1, 4)]
    hurried = rng.choice([0, 0, 0.2])
    for request in plain.requests:
        client = rng.choice(clients)
        in_s = rng.choice([0.0, rng.uniform(0, 20), rng.uniform(0, 200)])
        request.turn = Turn(
            client=client,
            weight=1.0 + len(client or ""),
            expected_tokens=rng.choice([None, request.sampling.max_tokens]),
            deadline_s=request.arrives_s + in_s if rng.random() < hurried else None,
        )
    return dataclasses.replace(plain, limits=limits)


def _with_grammars(plain: Scenario, rng: random.Random) -> None:
    """Perhaps some of the requests have one that takes its time."""
    if rng.random() < 0.5:
        return
    share, mean_s = rng.choice([0.2, 1.0]), rng.choice([0.1, 2.0, 20.0])
    for request in plain.requests:
        if rng.random() < share:
            request.compiles_s = rng.expovariate(1 / mean_s)
            request.malformed = rng.random() < 0.1


def _sharing(plain: Scenario, rng: random.Random) -> Scenario:
    """The same with prefix blocks, few or many, and prompts that begin alike and branch anywhere."""
    limits = plain.limits
    whole_chunks = limits.prefill_step_size <= 8 and rng.random() < 0.6
    size = limits.prefill_step_size if whole_chunks else rng.choice([1, 2, 4, 5, 16])
    limits = dataclasses.replace(
        limits,
        prefix_blocks=rng.choice([0, 1, 4, 10, 40, 40, 1000, 1000]),
        prefix_block_tokens=size,
        prefix_whole_chunks=whole_chunks,
    )
    trunks = [
        [rng.randrange(VOCAB) for _ in range(limits.context_length)]
        for _ in range(rng.choice([1, 2]))
    ]
    alike = rng.choice([0.5, 1.0])
    for request in plain.requests:
        if rng.random() < alike:
            shared = rng.choice([len(request.prompt), rng.randint(0, len(request.prompt))])
            request.prompt[:shared] = rng.choice(trunks)[:shared]
        request.salt = rng.choice([None, None, None, None, "a"])
    return _with_target(_with_disk(dataclasses.replace(plain, limits=limits), rng), rng)


def _with_target(plain: Scenario, rng: random.Random) -> Scenario:
    """The same, perhaps with a target for running streams, and chunks that may be cut for it."""
    limits = plain.limits
    grains = [g for g in (1, 2, 4) if limits.prefill_step_size % g == 0]
    if limits.prefix_whole_chunks or rng.random() < 0.6:
        return plain
    limits = dataclasses.replace(
        limits, max_itl_s=rng.choice([0.01, 1.0]), prefill_grain=rng.choice(grains)
    )
    return dataclasses.replace(plain, limits=limits)


def _with_disk(plain: Scenario, rng: random.Random) -> Scenario:
    """The same with block files, few or many, on a disk that may fail."""
    block_bytes = rng.choice([1, STAGED_BYTES, STAGED_BYTES // 3])
    blocks = rng.choice([0, 1, 5, 30, 1000])
    horizon_s = max(r.arrives_s for r in plain.requests) + 20
    return dataclasses.replace(
        plain,
        limits=dataclasses.replace(
            plain.limits,
            prefix_block_bytes=block_bytes,
            disk_block_bytes=block_bytes,
            disk_bytes=blocks * block_bytes,
            kv_bytes_per_token=1,
        ),
        pressures_s=[
            (at_s := rng.uniform(0, horizon_s), at_s + rng.expovariate(1 / 20))
            for _ in range(rng.choice([0, 0, 1, 3]))
        ],
        disk_faults=rng.choice([0, 0, 0.05, 0.5]),
        disk_losses_s=[rng.uniform(0, horizon_s) for _ in range(rng.choice([0, 0, 1, 2]))],
    )


def _request(rng: random.Random, seq_id: int, context: int, horizon_s: float) -> Request:
    arrives_s = rng.uniform(0, horizon_s)
    length = rng.choice([1, rng.randint(1, 8), rng.randint(1, context // 2), context + 1])
    if length > context and rng.random() < 0.8:
        length = rng.randint(1, context - 1)
    pauses_s = []
    at = arrives_s
    for _ in range(rng.choice([0, 0, 1, 6])):
        at += rng.expovariate(1 / rng.choice([3, 20]))
        pauses_s.append((at, at := at + rng.expovariate(1 / rng.choice([2, 20]))))
    return Request(
        seq_id=seq_id,
        prompt=[rng.randrange(VOCAB) for _ in range(length)],
        sampling=SamplingParams(
            seed=rng.randrange(2**32),
            choice=rng.randrange(2),
            max_tokens=rng.choice([1, rng.randint(1, 40), 10_000, 10_000]),
            min_tokens=rng.choice([0, 0, 5]),
            ignore_eos=rng.random() < 0.6,
            stop_token_ids=tuple(rng.sample(range(VOCAB), rng.choice([0, 0, 0, 2]))),
            logprobs=rng.choice([None, 0]),
        ),
        priority=rng.choice(list(Priority)),
        arrives_s=arrives_s,
        cancels_s=arrives_s + rng.expovariate(1 / 30) if rng.random() < 0.15 else None,
        pauses_s=pauses_s,
    )
