"""A launched step: its forward passes, what is drawn from each, and the wait for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from mlx_serving.errors import MLXServingError
from mlx_serving.runtime.backend.pooling import to_bytes
from mlx_serving.runtime.backend.sampler import Draw
from mlx_serving.runtime.core.disk import DiskEvent
from mlx_serving.runtime.core.plan import Sampled, StepResult


@dataclass(slots=True)
class Forward:
    """The logits of one forward pass, what each line of them is for, and the draw once it is made.

    A line whose row is None is nobody's. `positions` are those that the drawn tokens will have.
    """

    logits: mx.array | None
    """None: let go, for the draw is made."""
    rows: Sequence[int | None]
    seq_ids: Sequence[int | None]
    positions: Sequence[int]
    draw: Draw | None = None
    errors: dict[int, MLXServingError] = field(default_factory=dict)
    """By line: why the sequence cannot go on."""
    foreseen: set[int] = field(default_factory=set)
    """Lines whose token was known before it was drawn."""
    host_tokens: list[int] | None = None

    def tokens(self) -> list[int]:
        """Waits for the draw. Through the array's own buffer: an operation on it would be queued
        behind the forward passes launched since."""
        if self.host_tokens is None:
            assert self.draw is not None
            self.host_tokens = np.array(self.draw.tokens).tolist()
        return self.host_tokens

    def result(self) -> list[Sampled]:
        assert self.draw is not None
        tokens, logprobs = self.tokens(), self.draw.logprobs()
        return [
            Sampled(
                seq_id,
                [tokens[i]],
                [logprobs[i]] if i in logprobs else None,
                self.errors.get(i),
            )
            for i, seq_id in enumerate(self.seq_ids)
            if seq_id is not None
        ]


class MLXPendingStep:
    """A launched step. `wait` blocks until it and what was launched behind it are done.

    `settle` makes the draws that wait for a mask: it is called unless the next launch came first.
    `pooled`: vectors by seq_id.
    """

    def __init__(
        self,
        step_id: int,
        forwards: list[Forward],
        pooled: dict[int, mx.array],
        effect: Sequence[mx.array],
        settle: Callable[[], None],
        collect: Callable[[], Sequence[DiskEvent]],
    ) -> None:
        self._step_id = step_id
        self._collect = collect
        self._forwards = forwards
        self._pooled = pooled
        self._effect = effect
        """Stands for the step where nothing was sampled, and for those launched before `wait`."""
        self._settle = settle

    def wait(self) -> StepResult:
        if any(forward.draw is None for forward in self._forwards):
            self._settle()
        draws = [f.draw.arrays() for f in self._forwards if f.draw is not None]
        mx.eval(list(self._effect), draws, list(self._pooled.values()))
        sampled = [one for forward in self._forwards for one in forward.result()]
        sampled += [Sampled(i, [], vector=to_bytes(vector)) for i, vector in self._pooled.items()]
        return StepResult(self._step_id, sampled, self._collect())
