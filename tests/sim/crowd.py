"""More load than there is room for, under a virtual clock that knows what a step costs.

The real scheduler and a runner whose tokens are a function of their prefix; a step takes as long as
its rows and its prefill do on a small machine. Every answer is compared with what it is alone.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from mlx_serving.runtime.core import invariants
from mlx_serving.runtime.core.plan import Limits, PendingStep, StepPlan
from mlx_serving.runtime.core.scheduler import Scheduler
from mlx_serving.runtime.core.sequence import Sequence
from mlx_serving.types import Priority, SamplingParams, Turn
from sim.fake_runner import VOCAB, FakeRunner, next_token

STEP_S, ROW_S, PREFILL_TOKEN_S = 0.004, 0.0008, 0.0004
DEPTH = 2


def limits(rows: int = 16, **fields: object) -> Limits:
    return Limits(
        **{
            "max_num_seqs": rows,
            "prefill_step_size": 64,
            "context_length": 512,
            "kv_capacity_tokens": rows * 512,
            "kv_bucket_tokens": 64,
            "prefix_blocks": 2000,
            "prefix_block_tokens": 16,
            **fields,
        }  # type: ignore[arg-type]
    )


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds that a step takes."""

    step_s: float = STEP_S
    row_s: float = ROW_S
    prefill_token_s: float = PREFILL_TOKEN_S

    def of(self, plan: StepPlan) -> float:
        rows, tokens = len(plan.decode), plan.prefill_tokens
        return self.step_s + self.row_s * rows + self.prefill_token_s * tokens


SMALL_MACHINE = Costs()
SMOLLM2 = Costs(0.0047, 0.00138, 0.00093)
"""SmolLM2-135M in 4 bits on two cores: decoding 1, 8 and 16 rows, and prefill, as benchmarks/RESULTS.md
has them."""


@dataclass(slots=True, order=True)
class Customer:
    arrives_s: float
    seq_id: int
    priority: Priority = field(compare=False, default=Priority.NORMAL)
    prompt_tokens: int = field(compare=False, default=100)
    max_tokens: int = field(compare=False, default=40)
    turn: Turn = field(compare=False, default_factory=Turn)
    tokens: list[int] = field(compare=False, default_factory=list)
    first_s: float | None = field(compare=False, default=None)
    """When its first token was there."""
    done_s: float | None = field(compare=False, default=None)
    refused: bool = field(compare=False, default=False)

    @property
    def ttft_s(self) -> float:
        assert self.first_s is not None
        return self.first_s - self.arrives_s

    @property
    def prompt(self) -> list[int]:
        rng = random.Random(self.seq_id)
        return [rng.randrange(VOCAB) for _ in range(self.prompt_tokens)]

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(seed=self.seq_id, max_tokens=self.max_tokens, ignore_eos=True)

    def alone(self) -> list[int]:
        prefix = self.prompt
        for _ in range(self.max_tokens):
            prefix.append(next_token(prefix, self.prompt_tokens, self.sampling, ())[0])
        return prefix[self.prompt_tokens :]


class Crowd:
    def __init__(
        self,
        customers: Iterable[Customer],
        of: Limits,
        costs: Costs = SMALL_MACHINE,
    ) -> None:
        self.limits = of
        self._costs = costs
        self.scheduler = Scheduler(of)
        self.customers = {c.seq_id: c for c in sorted(customers)}
        self.now_s = 0.0
        self.preemptions = 0
        self._runner = FakeRunner(of)
        self._coming = list(self.customers.values())
        heapq.heapify(self._coming)
        self._calls = itertools.count()
        self._launched: deque[tuple[StepPlan, PendingStep]] = deque()

    def run(self, until_s: float = float("inf")) -> Crowd:
        """Until then, or until everybody has been served."""
        while self.now_s < until_s and (self._coming or self.scheduler.has_work):
            self._arrive()
            while len(self._launched) < self.scheduler.depth(DEPTH, self.now_s) and self._launch():
                pass
            if self._launched:
                self._deliver()
            elif self._coming:
                self.now_s = max(self.now_s, self._coming[0].arrives_s)
        return self

    def tokens(self) -> int:
        """Of prompts and answers, as far as answers have come."""
        return sum(c.prompt_tokens + len(c.tokens) for c in self.customers.values() if c.tokens)

    def served(self, client: str) -> int:
        """Tokens of a client's prompts and answers, as far as answers have come."""
        return sum(
            c.prompt_tokens + len(c.tokens)
            for c in self.customers.values()
            if c.turn.client == client and c.tokens
        )

    def check_answers(self) -> None:
        for customer in self.customers.values():
            if customer.refused:
                assert not customer.tokens
            else:
                assert customer.tokens == customer.alone()[: len(customer.tokens)]

    def _arrive(self) -> None:
        while self._coming and self._coming[0].arrives_s <= self.now_s:
            customer = heapq.heappop(self._coming)
            seq = Sequence(
                seq_id=customer.seq_id,
                tokens=customer.prompt,
                prompt_len=customer.prompt_tokens,
                sampling=customer.sampling,
                priority=customer.priority,
                turn=customer.turn,
            )
            self.scheduler.add(seq, customer.arrives_s)

    def _launch(self) -> bool:
        before = len(self.scheduler.rows)
        plan = self.scheduler.schedule(self.now_s)
        if next(self._calls) % 32 == 0:
            invariants.check(self.scheduler)  # it looks at everybody who waits
        for refused in self.scheduler.refused:
            self.customers[refused.seq_id].refused = True
        self.scheduler.refused.clear()
        if plan is None:
            return False
        self.preemptions += max(0, before + len(plan.starts) - len(self.scheduler.rows))
        self._launched.append((plan, self._runner.launch(plan)))
        return True

    def _deliver(self) -> None:
        plan, pending = self._launched.popleft()
        took_s = self._costs.of(plan)
        self.now_s += took_s
        self.scheduler.observe(plan, took_s)
        for emitted in self.scheduler.apply(pending.wait()):
            customer = self.customers[emitted.seq_id]
            customer.tokens += emitted.token_ids
            if customer.first_s is None:
                customer.first_s = self.now_s
            if emitted.finish_reason is not None:
                customer.done_s = self.now_s


def poisson(
    rng: random.Random, per_s: float, until_s: float, ids: itertools.count[int], **fields: object
) -> list[Customer]:
    """Customers that come independently of one another, `per_s` a second on average."""
    found, now_s = [], rng.expovariate(per_s)
    while now_s < until_s:
        found.append(Customer(now_s, next(ids), **fields))  # type: ignore[arg-type]
        now_s += rng.expovariate(per_s)
    return found
