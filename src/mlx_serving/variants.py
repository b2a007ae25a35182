"""Who answers a request in place of the model that it asks for, and whose copies are compared: feature
flags (`traffic.feature_flags`) and rollouts (`traffic.rollouts`) among the served models.

    asked for ─flag's use─▶ model ─rollout─▶ variant

What cannot answer costs nobody an answer: the one before it does.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from mlx_serving.catalog.lifecycle import ModelSlot
from mlx_serving.config import Config
from mlx_serving.errors import ConfigError, MLXServingError, ModelNotFound
from mlx_serving.generation import Generation, Served
from mlx_serving.roster import Roster
from mlx_serving.telemetry.metrics import Metrics
from mlx_serving.traffic.feature_flags import (
    PARAM,
    UNSWITCHED,
    Flag,
    Switched,
    concerning,
    parse_all,
    switched,
)
from mlx_serving.traffic.rollouts import (
    FAILED,
    Arm,
    Rollout,
    Rollouts,
    Spec,
    effective_share,
)
from mlx_serving.traffic.shadow import Shadows, disagreement
from mlx_serving.types import GenerateRequest, Priority

log = logging.getLogger(__name__)

Open = Callable[[GenerateRequest], Awaitable[Generation]]


@dataclass(frozen=True, slots=True)
class Answerer:
    """The model that answers. It is in use."""

    slot: ModelSlot[Served]
    served: Served
    arm: Arm | None


class Variants:
    """What answers a copy is settled: no flag and no rollout is about one.

    Args: open_: accepts a copy of a request.

    Raises ConfigError for a flag that is none.
    """

    def __init__(self, config: Config, slots: Roster, open_: Open, metrics: Metrics) -> None:
        self._slots = slots
        self._open = open_
        self._metrics = metrics
        self._shadows = Shadows(metrics.shadows_skipped.inc)
        file = config.rollouts_file
        self.rollouts = Rollouts(Path(file) if file else None, self._show_share)
        self.flags = self.parse_flags(config.feature_flags)

    def start(self, spec: Spec) -> Rollout:
        """Raises InvalidRequest or ModelNotFound, naming the field of `spec`."""
        for field in ("model", "variant"):
            try:
                served = self._slots.find(getattr(spec, field)).model_id
            except ModelNotFound as error:
                error.param = field
                raise
            spec = msgspec.structs.replace(spec, **{field: served})
        return self.rollouts.start(spec)

    def parse_flags(self, texts: Sequence[str]) -> tuple[Flag, ...]:
        """Raises ConfigError."""

        def served(name: str) -> str:
            try:
                return self._slots.find(name).model_id
            except ModelNotFound as error:
                raise ConfigError(f"{PARAM}: {error.message}", param=PARAM) from None

        return parse_all(texts, served)

    def switched(self, asked: ModelSlot[Served], request: GenerateRequest) -> Switched:
        """What the flags make of a request."""
        if request.shadow or not self.flags:
            return UNSWITCHED
        found = switched(self.flags, asked.model_id, _key(request))
        for name in concerning(self.flags, asked.model_id):
            side = "on" if name in found.flags else "off"
            self._metrics.flagged.labels(name, side).inc()
        return found

    async def answerer(
        self, asked: ModelSlot[Served], request: GenerateRequest, use: str | None
    ) -> Answerer:
        """Raises what becomes of the model asked for. `use`: what a flag has answer in its place."""
        if use is not None and use != asked.model_id:
            try:
                return await self._in_rollout(self._slots.find(use), request)
            except MLXServingError as error:
                log.warning("feature flag: %s", error.message)
        return await self._in_rollout(asked, request)

    async def _in_rollout(self, asked: ModelSlot[Served], request: GenerateRequest) -> Answerer:
        arm = None if request.shadow else self.rollouts.arm(asked.model_id, _key(request))
        if arm is not None and arm.is_variant:
            try:
                slot = self._slots.find(arm.model)
                return Answerer(slot, await slot.acquire(), arm)
            except MLXServingError as error:
                # The variant's fault is not the client's: the model itself answers.
                log.warning("rollout %s: %s", arm.rollout, error.message)
                self.rollouts.observe(arm, FAILED)
                arm = None
        return Answerer(asked, await asked.acquire(), arm)

    def shadow(
        self, asked: ModelSlot[Served], request: GenerateRequest, original: Generation
    ) -> None:
        """Have a variant answer a copy, if one is to, and compare."""
        arm = None if request.shadow else self.rollouts.shadow(asked.model_id, _key(request))
        if arm is None:
            return
        ours = msgspec.structs.replace(arm, model=asked.model_id, is_variant=False)
        original.arm, original.tokens = ours, []
        copied = msgspec.structs.replace(
            request,
            request_id=f"{request.request_id}-shadow",
            model=arm.model,
            seed=original.seed,
            n=1,
            priority=Priority.LOW,
            client=None,  # whose share it is not to take
            caching="none",
            shadow=True,
        )

        async def compare() -> None:
            copy = await self._open(copied)
            copy.arm, copy.tokens = arm, []
            try:
                async for _ in copy:
                    pass
                await original.ended.wait()
            finally:
                copy.cancel()
            found = disagreement(original.tokens or (), copy.tokens)
            self.rollouts.observe(ours, {"disagreement": 0.0})
            self.rollouts.observe(arm, {"disagreement": found})

        self._shadows.start(compare, copied.request_id)

    def stop_copying(self) -> None:
        self._shadows.cancel()

    def _show_share(self, rollout: Rollout) -> None:
        spec, gauge = rollout.spec, self._metrics.rollout_share
        if rollout.status == "stopped":
            gauge.remove(spec.name, spec.model, spec.variant)
        else:
            gauge.labels(spec.name, spec.model, spec.variant).set(effective_share(rollout))


def _key(request: GenerateRequest) -> str:
    """What stays with one variant."""
    return request.session or request.request_id
