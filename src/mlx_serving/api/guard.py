"""The gateway in its caller's name: every dialect goes through it, so that none can forget a key's
models, limits or share of the cache."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec

from mlx_serving import clock
from mlx_serving.api.access import caller
from mlx_serving.api.keys import Key, Keyring
from mlx_serving.api.port import GatewayPort, Generation
from mlx_serving.errors import Forbidden, MLXServingError
from mlx_serving.live import LiveSettings
from mlx_serving.traffic.allowance import Allowance, Limits
from mlx_serving.traffic.rollouts import Rollout, Rollouts, Spec
from mlx_serving.traffic.source import Reused
from mlx_serving.types import (
    CacheStats,
    Embeddings,
    EmbedRequest,
    GenerateRequest,
    ModelInfo,
    Priority,
    Prompt,
    Ranking,
    RankRequest,
    ServedModel,
    TokenEvent,
    Usage,
)

R = TypeVar("R", EmbedRequest, RankRequest)


class Guard:
    """A GatewayPort for whoever `access.caller` is."""

    def __init__(self, gateway: GatewayPort, keyring: Keyring) -> None:
        self._gateway = gateway
        self._keyring = keyring
        self._allowances: dict[tuple[str, Limits], Allowance] = {}

    async def open(self, request: GenerateRequest) -> Generation:
        key = caller.get().key
        if key is None:
            return await self._gateway.open(request)
        self._check(request.model)
        allowance = self._allowance(key)
        allowance.enter(clock.monotonic())
        try:
            generation = await self._gateway.open(signed(request, key))
        except BaseException:
            allowance.leave()
            raise
        return Metered(generation, allowance)

    async def embed(self, request: EmbedRequest) -> Embeddings:
        with self._counted(request.model):
            found = await self._gateway.embed(_named(request))
        self._spend(found.usage)
        return found

    async def rank(self, request: RankRequest) -> Ranking:
        with self._counted(request.model):
            found = await self._gateway.rank(_named(request))
        self._spend(found.usage)
        return found

    async def tokenise(self, model: str, prompt: Prompt) -> list[int]:
        with self._counted(model):
            return await self._gateway.tokenise(model, prompt)

    async def detokenise(self, model: str, token_ids: Sequence[int]) -> str:
        with self._counted(model):
            return await self._gateway.detokenise(model, token_ids)

    async def load(
        self, model: str, keep_alive_s: float | None = None, *, anew: bool = False
    ) -> ServedModel:
        with self._counted(model):
            return await self._gateway.load(model, keep_alive_s, anew=anew)

    async def unload(self, model: str) -> ServedModel:
        with self._counted(model):
            return await self._gateway.unload(model)

    def pin(self, model: str, pinned: bool) -> ServedModel:
        self._check(model)
        return self._gateway.pin(model, pinned)

    def model_id(self, model: str) -> str:
        self._check(model)
        return self._gateway.model_id(model)

    def model_info(self, model: str) -> ModelInfo | None:
        self._check(model)
        return self._gateway.model_info(model)

    def abilities(self, model: str) -> tuple[str, ...]:
        self._check(model)
        return self._gateway.abilities(model)

    def default_model(self) -> str:
        """The first model that the caller may use."""
        if caller.get().key is None:
            return self._gateway.default_model()
        models = self.models()
        return models[0].id if models else self._gateway.default_model()

    def models(self) -> list[ServedModel]:
        key = caller.get().key
        return [m for m in self._gateway.models() if key is None or key.allows(m.id)]

    def health(self) -> Mapping[str, Any]:
        """Whole for a key, and for this machine; the status alone for anybody else."""
        health, who = self._gateway.health(), caller.get()
        if who.admin or who.local or not self._keyring.keys:
            return health
        if who.key is None:
            return {"status": health["status"]}
        models = [m for m in health.get("models", ()) if who.key.allows(m["id"])]
        return {"status": health["status"], "models": models}

    @property
    def rollouts(self) -> Rollouts:
        return self._gateway.rollouts

    def start_rollout(self, spec: Spec) -> Rollout:
        return self._gateway.start_rollout(spec)

    @property
    def live(self) -> LiveSettings:
        return self._gateway.live

    def cache_stats(self) -> Mapping[str, CacheStats]:
        return self._gateway.cache_stats()

    async def clear_cache(self) -> None:
        await self._gateway.clear_cache()

    def metrics(self) -> bytes:
        return self._gateway.metrics()

    async def drain(self, timeout_s: float) -> bool:
        return await self._gateway.drain(timeout_s)

    @contextmanager
    def _counted(self, model: str) -> Iterator[None]:
        """Work that makes no tokens is a request all the same."""
        key = caller.get().key
        if key is None:
            yield
            return
        self._check(model)
        allowance = self._allowance(key)
        allowance.enter(clock.monotonic())
        try:
            yield
        finally:
            allowance.leave()

    def _spend(self, usage: Usage) -> None:
        if (key := caller.get().key) is not None:
            self._allowance(key).spend(usage.total_tokens, clock.monotonic())

    def _allowance(self, key: Key) -> Allowance:
        """One for each key and what it allows, which may change while its requests run."""
        made = self._allowances.get((key.name, key.limits))
        if made is None:
            made = self._allowances[key.name, key.limits] = Allowance(key.name, key.limits)
        return made

    def _check(self, model: str) -> None:
        """Raises Forbidden for a model that the caller may not use, whether or not it exists."""
        key = caller.get().key
        if key is None or key.allows(model):
            return
        resolved = self._resolved(model)
        if resolved is not None and key.allows(resolved):
            return
        raise Forbidden(
            f"The key '{key.name}' may not use the model '{model[:200]}'.",
            param="model",
            code="model_not_allowed",
        )

    def _resolved(self, model: str) -> str | None:
        """The id that an alias leads to."""
        try:
            return self._gateway.model_id(model)
        except MLXServingError:
            return None


def signed(request: GenerateRequest, key: Key) -> GenerateRequest:
    """The request under its key's name, priority and share of the prefix cache."""
    return msgspec.structs.replace(
        request,
        client=key.name,
        priority=_priority(request.priority, key.priority),
        weight=key.weight,
        cache_salt=_salt(request.cache_salt, key),
    )


def _named(request: R) -> R:
    """A request for vectors or a ranking under its caller's name and priority."""
    key = caller.get().key
    if key is None:
        return request
    priority = _priority(request.priority, key.priority)
    return msgspec.structs.replace(request, client=key.name, priority=priority)


def _priority(asked: Priority, own: Priority | None) -> Priority:
    """A key's class, or what the request asks for where that is later."""
    if own is None:
        return asked
    return own if asked is Priority.NORMAL else max(asked, own)


def _salt(asked: str | None, key: Key) -> str | None:
    """Keys have no slash in their names, so that no two keys' salts are alike."""
    scope = "" if key.share_cache else key.name
    return f"{scope}/{asked or ''}" if scope or asked is not None else None


class Metered:
    """A generation that pays from its key's allowance, and leaves when it has ended."""

    def __init__(self, generation: Generation, allowance: Allowance) -> None:
        self._generation = generation
        self._allowance = allowance
        self._left = False
        allowance.spend(generation.prompt_tokens, clock.monotonic())

    @property
    def request_id(self) -> str:
        return self._generation.request_id

    @property
    def prompt_tokens(self) -> int:
        return self._generation.prompt_tokens

    @property
    def cached_tokens(self) -> int:
        return self._generation.cached_tokens

    @property
    def seed(self) -> int:
        return self._generation.seed

    @property
    def reused(self) -> Reused | None:
        return self._generation.reused

    @property
    def variant(self) -> str | None:
        return self._generation.variant

    @property
    def flags(self) -> tuple[str, ...]:
        return self._generation.flags

    @property
    def prompt_text(self) -> str | None:
        return self._generation.prompt_text

    async def __aiter__(self) -> AsyncIterator[list[TokenEvent]]:
        try:
            async for events in self._generation:
                yield events
        finally:
            self._leave()

    def cancel(self) -> None:
        self._generation.cancel()
        self._leave()

    def usage(self) -> Usage:
        return self._generation.usage()

    def _leave(self) -> None:
        if not self._left:
            self._left = True
            self._allowance.spend(self.usage().completion_tokens, clock.monotonic())
            self._allowance.leave()
