"""What the API needs of the gateway. `gateway.Gateway` and the tests' fakes have this shape."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Literal, Protocol

from mlx_serving.live import LiveSettings
from mlx_serving.traffic.rollouts import Rollout, Rollouts, Spec
from mlx_serving.types import (
    CacheStats,
    Embeddings,
    EmbedRequest,
    GenerateRequest,
    ModelInfo,
    Prompt,
    Ranking,
    RankRequest,
    ServedModel,
    TokenEvent,
    Usage,
)


class Cancellable(Protocol):
    """What runs for an exchange, and may be stopped from another one."""

    def cancel(self) -> None:
        """Free what it holds. Idempotent, and harmless once it has ended."""
        ...


class Generation(Protocol):
    """A running request. Iterating it ends when every choice has finished, or raises."""

    @property
    def request_id(self) -> str: ...

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def cached_tokens(self) -> int: ...

    @property
    def seed(self) -> int:
        """The seed in use: the client's, or the one drawn at admission."""
        ...

    @property
    def reused(self) -> Literal["hit", "shared", "miss"] | None:
        """Whether the answer was computed for it; None: nobody looked for another."""
        ...

    @property
    def variant(self) -> str | None:
        """The model that answers in place of the one asked for, because of a rollout or a flag."""
        ...

    @property
    def flags(self) -> tuple[str, ...]:
        """The feature flags in whose share it is."""
        ...

    @property
    def prompt_text(self) -> str | None:
        """The prompt as text, for `echo`."""
        ...

    def __aiter__(self) -> AsyncIterator[list[TokenEvent]]:
        """Batches of events of all choices, one batch a wake-up."""
        ...

    def cancel(self) -> None:
        """Free its rows. Idempotent, and harmless once it has ended."""
        ...

    def usage(self) -> Usage: ...


class GatewayPort(Protocol):
    def default_model(self) -> str: ...

    def models(self) -> list[ServedModel]:
        """Every configured model, the default first."""
        ...

    def health(self) -> Mapping[str, Any]:
        """`{"status": "starting|ready|degraded|draining", "workers": [...], ...}`."""
        ...

    async def open(self, request: GenerateRequest) -> Generation:
        """Admit and tokenise; raises every refusal (typed) before any output."""
        ...

    async def embed(self, request: EmbedRequest) -> Embeddings:
        """Vectors of texts; cancelled with its task."""
        ...

    async def rank(self, request: RankRequest) -> Ranking:
        """Documents in order of relevance; cancelled with its task."""
        ...

    async def tokenise(self, model: str, prompt: Prompt) -> list[int]:
        """A prompt's token ids, as `open` would have them."""
        ...

    async def detokenise(self, model: str, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included."""
        ...

    async def load(
        self, model: str, keep_alive_s: float | None = None, *, anew: bool = False
    ) -> ServedModel:
        """Wait until a model can answer; raises why it cannot. `keep_alive_s` as in a request; `anew`:
        try even where it has just failed."""
        ...

    async def unload(self, model: str) -> ServedModel:
        """Take a model out of memory once its running requests have ended."""
        ...

    def pin(self, model: str, pinned: bool) -> ServedModel:
        """Whether a model may leave memory by itself."""
        ...

    def model_id(self, model: str) -> str:
        """The id of the served model that a name leads to. Raises ModelNotFound."""
        ...

    def model_info(self, model: str) -> ModelInfo | None:
        """What is known of a loaded model; None while it is not. Raises ModelNotFound."""
        ...

    def abilities(self, model: str) -> tuple[str, ...]:
        """Of `tools` and `thinking`, those that a loaded model's chat template knows."""
        ...

    @property
    def rollouts(self) -> Rollouts: ...

    def start_rollout(self, spec: Spec) -> Rollout:
        """Raises InvalidRequest or ModelNotFound, naming the field of `spec`."""

    @property
    def live(self) -> LiveSettings:
        """The settings in force."""
        ...

    def cache_stats(self) -> Mapping[str, CacheStats]:
        """Of each model's prefix cache."""
        ...

    async def clear_cache(self) -> None:
        """Empty them, but for what running sequences use."""
        ...

    def metrics(self) -> bytes:
        """Prometheus text."""
        ...

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests, wait for the running ones; True when all of them finished."""
        ...
