"""Keeps the models in memory within the budget: asks `budget.decide`, and does what it says."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import assert_never

from mlx_serving.catalog.budget import (
    PATIENCE_S,
    Drain,
    Evict,
    Fits,
    Hold,
    Never,
    Resident,
    decide,
)
from mlx_serving.catalog.lifecycle import AnySlot, Draining, LoadBegan, NoRoom
from mlx_serving.errors import ModelTooLarge, Overloaded

log = logging.getLogger(__name__)

RETRY_AFTER_S = 5.0


class Residency:
    """What the slots' models need of `budget_bytes`. Models that want in wait in order of coming.

    Args:
        wait_s: how long a model that does not fit now may wait for others to leave.
    """

    def __init__(self, budget_bytes: int, *, wait_s: float, patience_s: float = PATIENCE_S) -> None:
        self.budget_bytes = budget_bytes
        self.evictions = 0
        self.wait_s = wait_s
        self._patience_s = patience_s
        self._slots: dict[str, AnySlot] = {}
        self._needs: dict[str, int] = {}
        """Of the models in memory, and of those that are on their way."""
        self._measured: dict[str, int] = {}
        """What a model turned out to need when it was loaded last."""
        self._loading: set[str] = set()
        self._turn = asyncio.Lock()
        self._changed = asyncio.Event()

    def watch(self, slots: Sequence[AnySlot]) -> None:
        for slot in slots:
            self._slots[slot.model_id] = slot
            slot.on_change = self._change

    @property
    def held_bytes(self) -> int:
        return sum(self._needs.values())

    def need_of(self, model_id: str) -> int | None:
        """Bytes that it holds; None: it is not in memory."""
        return self._needs.get(model_id)

    async def make_room(self, slot: AnySlot, estimate_bytes: int, *, asked: bool) -> None:
        """Wait until the model may be loaded; its bytes are then taken. `estimate_bytes` counts until
        it was loaded once.

        Raises ModelTooLarge if it never fits, Overloaded if not within the wait, NoRoom if it does
        not fit now and nobody `asked`.
        """
        need = self._measured.get(slot.model_id, estimate_bytes)
        # An adapter does not queue: who waits there may wait for its model, which it keeps in use.
        async with self._turn if slot.base is None else nullcontext():
            began_s = time.monotonic()
            while not await self._try(slot, need, began_s, asked):
                pass
            self._needs[slot.model_id] = need
            self._loading.add(slot.model_id)

    def loaded(self, model_id: str, measured_bytes: int) -> None:
        self._loading.discard(model_id)
        self._measured[model_id] = self._needs[model_id] = measured_bytes
        self._change()

    def gone(self, model_id: str) -> None:
        self._loading.discard(model_id)
        self._needs.pop(model_id, None)
        self._change()

    def relieve(self, short_bytes: int) -> None:
        """Requests of loaded models wait for so much more: let idle models go for it, as many as it
        takes or there are."""
        idle = [r for r in self._residents() if not (r.busy or r.pinned or r.loading or r.leaving)]
        most = min(short_bytes, sum(r.need_bytes for r in idle))
        decision = decide(sum(r.need_bytes for r in idle), idle, most)
        if isinstance(decision, Evict):
            self._unload(decision.model_ids)

    async def clear_for(self, slot: AnySlot, spared: str) -> bool:
        """Have idle models leave for one that is likely next, the least recently used first and never
        `spared`. False: it does not fit so, or was never loaded, or others wait for memory."""
        need = self._measured.get(slot.model_id)
        if need is None or self._turn.locked():
            return False
        bases = [s.base.model_id for s in (slot, self._slots[spared]) if s.base is not None]
        kept = {spared, *bases}
        residents = [
            replace(r, busy=r.busy or r.model_id in kept)
            for r in self._residents()
            if r.model_id != slot.model_id
        ]
        decision = decide(self.budget_bytes, residents, need)
        if isinstance(decision, Evict):
            await asyncio.wait(self._unload(decision.model_ids))
        return isinstance(decision, Fits | Evict)

    async def _try(self, slot: AnySlot, need: int, began_s: float, asked: bool) -> bool:
        """One look; True: it fits."""
        waited_s = time.monotonic() - began_s
        residents = [r for r in self._residents() if r.model_id != slot.model_id]
        if slot.base is not None:  # which does not leave for its own adapter
            ours = slot.base.model_id
            residents = [replace(r, pinned=r.pinned or r.model_id == ours) for r in residents]
        decision = decide(
            self.budget_bytes, residents, need, waited_s=waited_s, patience_s=self._patience_s
        )
        if not asked and not isinstance(decision, Fits | Never):
            raise NoRoom
        match decision:
            case Fits():
                return True
            case Never(most, pinned):
                raise _too_large(slot.model_id, need, most, pinned)
            case Evict(model_ids):
                await asyncio.wait(self._unload(model_ids))
                return False
            case Drain(model_ids):
                self._unload(model_ids)
            case Hold():
                pass
            case _:
                assert_never(decision)
        await self._wait(slot, waited_s)
        return False

    async def _wait(self, slot: AnySlot, waited_s: float) -> None:
        """Until something changes, or patience or the time is over."""
        if waited_s >= self.wait_s:
            raise Overloaded(
                f"Model '{slot.model_id}' does not fit beside the models in use; "
                f"waited {waited_s:.0f} s for them.",
                code="no_memory_now",
                retry_after_s=RETRY_AFTER_S,
            )
        slot.enter(LoadBegan("it waits for memory that other models use"))
        self._changed.clear()
        until_s = self._patience_s if waited_s < self._patience_s else self.wait_s
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.01, min(until_s, self.wait_s) - waited_s)):
                await self._changed.wait()

    def _unload(self, model_ids: Iterable[str]) -> list[asyncio.Task[None]]:
        tasks = []
        for model_id in model_ids:
            log.info("%s leaves memory", model_id)
            self.evictions += 1
            tasks.append(self._slots[model_id].unload())
        return tasks

    def _residents(self) -> list[Resident]:
        return [self._resident(model_id) for model_id in self._needs]

    def _resident(self, model_id: str) -> Resident:
        slot = self._slots[model_id]
        return Resident(
            model_id,
            self._needs[model_id],
            slot.used_s,
            busy=slot.busy,
            pinned=slot.stays,
            loading=model_id in self._loading,
            leaving=isinstance(slot.state, Draining),
        )

    def _change(self) -> None:
        self._changed.set()


def _too_large(model_id: str, need: int, most: int, pinned: tuple[str, ...]) -> ModelTooLarge:
    beside = f" beside the pinned {', '.join(pinned)}" if pinned else ""
    return ModelTooLarge(
        f"Model '{model_id}' needs {_mib(need)}; memory_budget leaves {_mib(most)}{beside}. Raise "
        f"it by {_mib(need - most)}, or serve smaller or more strongly quantised weights.",
        param="model",
    )


def _mib(count: int) -> str:
    return f"{-(-count // 2**20)} MiB"
