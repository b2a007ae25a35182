"""What a generation reads: the rows of one sequence, wherever they come from.

Ask ─▶ worker's own stream │ a sequence that others read too │ a replay from the cache ─▶ TokenRows
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from typing import Literal, Protocol

import msgspec

from mlx_serving.types import NO_TURN, Caching, Grammar, Priority, SamplingParams, Turn
from mlx_serving.worker.wire import TokenRow

Reused = Literal["hit", "shared", "miss"]
"""hit: replayed from the cache; shared: another request's sequence; miss: computed, and others may
follow it."""


class RowSource(Protocol):
    """The rows of one sequence. Iterated once; raises what became of the sequence (errors.py)."""

    @property
    def reused(self) -> Reused | None:
        """None: it was not looked whether anything could be."""
        ...

    @property
    def seed(self) -> int:
        """The seed that its random numbers are keyed by."""
        ...

    @property
    def begun(self) -> bool:
        """Something of it has been computed: it no longer only waits."""
        ...

    @property
    def begun_s(self) -> float | None:
        """When that was first so, of the monotonic clock."""
        ...

    def __aiter__(self) -> AsyncIterator[TokenRow]: ...

    def cancel(self) -> None:
        """Its reader leaves. Idempotent."""
        ...


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence as a request wants it, everything settled and tokenised."""

    model_id: str
    fingerprint: str = ""
    """Of the model's files: a name may come to mean other weights."""
    token_ids: list[int]
    sampling: SamplingParams
    grammar: Grammar | None = None
    stop: tuple[str, ...] = ()
    one_call: bool = False
    """The first tool call ends the answer."""
    cache_salt: str | None = None
    seeded: bool = False
    """The client gave the seed."""
    priority: Priority = Priority.NORMAL
    turn: Turn = NO_TURN
    caching: Caching = "use"

    @property
    def deterministic(self) -> bool:
        return self.seeded or self.sampling.temperature == 0


_encode = msgspec.msgpack.Encoder().encode


def digest(ask: Ask) -> bytes:
    """SHA-256 over everything that decides which tokens the answer has and where it ends.

    Greedy answers do not depend on seed and choice; where the client gave no seed, any is as good.
    """
    sampling, keyed = ask.sampling, ask.seeded and ask.sampling.temperature > 0
    canonical = msgspec.structs.replace(
        ask,
        sampling=msgspec.structs.replace(
            sampling,
            seed=sampling.seed if keyed else 0,
            choice=sampling.choice if sampling.temperature > 0 else 0,
            logit_bias=dict(sorted(sampling.logit_bias.items())),
        ),
        seeded=keyed,
        priority=Priority.NORMAL,
        turn=NO_TURN,
        caching="use",
    )
    return hashlib.sha256(_encode(canonical)).digest()
