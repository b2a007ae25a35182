"""The served models by every name that leads to them, and how each is shown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

from mlx_serving.catalog.lifecycle import Failed, ModelSlot, Ready, status_of
from mlx_serving.errors import ConfigError, ModelNotFound
from mlx_serving.generation import Served
from mlx_serving.types import ServedModel
from mlx_serving.worker.port import WorkerClient

Slot = ModelSlot[Served]


class Roster:
    """`aliases`: `claude-*` is the default model, `claude-*=name` the one of that name. Raises
    ConfigError for one that leads nowhere."""

    def __init__(self, slots: Sequence[Slot], aliases: Sequence[str], worker: WorkerClient) -> None:
        assert slots, "a gateway serves at least one model"
        self._slots = slots
        self._worker = worker
        self.aliases = self.resolved(aliases)

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._slots)

    @property
    def default(self) -> Slot:
        return self._slots[0]

    @property
    def bases(self) -> list[Slot]:
        """The models, without their adapters."""
        return [slot for slot in self._slots if slot.base is None]

    def find(self, model: str) -> Slot:
        """Raises ModelNotFound."""
        found = self._find(model)
        if found is not None:
            return found
        served = ", ".join(f"'{slot.model_id}'" for slot in self._slots)
        raise ModelNotFound(
            f"Model '{model[:200]}' is not served here; served: {served}.", param="model"
        )

    def _find(self, model: str) -> Slot | None:
        for slot in self._slots:
            if slot.answers_to(model):
                return slot
        base, plus, adapter = model.rpartition("+")
        of = self._find(base) if plus else None
        if of is not None:
            wanted = f"{of.model_id}+{adapter}"
            named = (a for a in of.adapters if wanted == a.model_id or adapter == a.source)
            return next(named, None)
        return next((slot for pattern, slot in self.aliases if fnmatchcase(model, pattern)), None)

    def describe(self, slot: Slot) -> ServedModel:
        """Why the worker cannot serve it comes before what the slot believes."""
        broken = self._worker.broken.get(slot.model_id)
        status, reason = status_of(slot.state) if broken is None else ("failed", broken.message)
        loaded = slot.state.loaded if isinstance(slot.state, Ready) else None
        wired = self._worker.wired.get(slot.model_id)
        error = slot.state.error if isinstance(slot.state, Failed) and not broken else broken
        return ServedModel(
            id=slot.model_id,
            created=slot.created,
            status=status,
            reason=reason,
            cause=error.code if error else None,
            aliases=(*slot.aliases, *self._plain_names(slot)),
            parent=slot.base.model_id if slot.base else None,
            context_length=loaded.info.context_length if loaded else None,
            pinned=slot.pinned,
            expires_in_s=slot.expires_in_s,
            wired_bytes=wired.bytes if wired else 0,
            not_wired=wired.why_not if wired and slot.pinned else None,
        )

    def _plain_names(self, slot: Slot) -> list[str]:
        """The patterns that can only be this one name."""
        ours = (pattern for pattern, other in self.aliases if other is slot)
        return [name for name in ours if not set("*?[") & set(name)]

    def resolved(self, aliases: Iterable[str]) -> list[tuple[str, Slot]]:
        """Patterns, and where each leads. Raises ConfigError."""
        return [self._pattern(alias) for alias in aliases]

    def _pattern(self, alias: str) -> tuple[str, Slot]:
        pattern, _, name = alias.partition("=")
        slot = next((s for s in self._slots if not name or s.answers_to(name)), None)
        if not pattern or slot is None:
            raise ConfigError(
                f"model_aliases: '{alias}' names no served model", param="model_aliases"
            )
        return pattern, slot


def brief(model: ServedModel) -> dict[str, object]:
    """As /health has it."""
    pinned = {"wired_bytes": model.wired_bytes, "not_wired": model.not_wired}
    return {
        "id": model.id,
        "status": model.status,
        "reason": model.reason,
        "pinned": model.pinned,
        **(pinned if model.pinned else {}),
    }
