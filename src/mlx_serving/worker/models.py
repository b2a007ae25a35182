"""What a worker should have loaded, the orders for each model, and what is held against them.

A model is blamed for a death when the worker was loading it, or was giving the token of a probe.
Blamed for `limit` deaths in a row it is quarantined: refused, and not loaded again, until
`pardon()`. So one model's defect does not take the others with it.
"""

from __future__ import annotations

from mlx_serving.errors import MLXServingError, ModelBroken
from mlx_serving.worker.wire import ModelOptions, Order


class Models:
    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._wanted: dict[str, tuple[str, ModelOptions]] = {}
        self._orders: dict[tuple[str, type[Order]], Order] = {}
        """The last of each kind for a model, loaded or not; those that take one back are not kept."""
        self._broken: dict[str, MLXServingError] = {}
        """Those that the present worker could not reload, and why."""
        self._quarantined: dict[str, ModelBroken] = {}
        self._deaths: dict[str, int] = {}

    @property
    def wanted(self) -> tuple[str, ...]:
        return tuple(self._wanted)

    @property
    def broken(self) -> dict[str, MLXServingError]:
        return {**self._broken, **self._quarantined}

    def to_reload(self) -> list[tuple[str, str, ModelOptions]]:
        """For a new worker: (id, path, options)."""
        self._broken.clear()
        wanted = self._wanted.items()
        return [(m, *how) for m, how in wanted if m not in self._quarantined]

    def loaded(self, model_id: str, path: str, options: ModelOptions) -> None:
        self._wanted[model_id] = (path, options)
        self._broken.pop(model_id, None)
        self.acquit(model_id)

    def order(self, order: Order) -> None:
        """What every worker that loads the model is to be told from now on."""
        kind = type(order)
        if order == kind(model_id=order.model_id):
            self._orders.pop((order.model_id, kind), None)
        else:
            self._orders[order.model_id, kind] = order

    def orders(self, model_id: str) -> list[Order]:
        return [order for (of, _), order in self._orders.items() if of == model_id]

    def not_reloaded(self, model_id: str, why: MLXServingError) -> None:
        self._broken[model_id] = why

    def unwant(self, model_id: str) -> None:
        self._wanted.pop(model_id, None)
        self._broken.pop(model_id, None)

    def check(self, model_id: str) -> None:
        """Raises ModelBroken for one that cannot be served at present."""
        why = self.broken.get(model_id)
        if why is not None:
            raise ModelBroken(why.message)

    def check_quarantine(self, model_id: str) -> None:
        """Raises ModelBroken for one that is not to be loaded."""
        if model_id in self._quarantined:
            raise ModelBroken(self._quarantined[model_id].message)

    def blame(self, model_id: str, cause: str, *, at_once: bool) -> ModelBroken | None:
        """Count a death; the reason if it is quarantined now. `at_once`: do not wait for more."""
        deaths = self._deaths[model_id] = self._deaths.get(model_id, 0) + 1
        if deaths < self._limit and not at_once:
            return None
        error = self._quarantined[model_id] = ModelBroken(
            f"model {model_id!r} is quarantined until a restart: {deaths} worker(s) in a row died "
            f"over it; the last: {cause}"
        )
        return error

    def acquit(self, model_id: str) -> None:
        self._deaths.pop(model_id, None)

    def pardon(self) -> None:
        self._quarantined.clear()
        self._deaths.clear()
