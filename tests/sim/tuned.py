"""The simulation while its limits change: between any two steps, and kept over a worker's death."""

from __future__ import annotations

import dataclasses
import random

from sim.simulation import Simulation


class Tuned(Simulation):
    def __init__(self, seed: int) -> None:
        self._drawn = random.Random(seed ^ 0x7E4E)
        self._tuning: tuple[int | None, int | None] = (None, None)
        self._cuts_anywhere: bool | None = None
        self.lowered = self.raised = self.over = self.cut = 0
        """Changes of the ceiling; plans made while more rows were there than it allows, and plans with
        a chunk that ends where none did before."""
        super().__init__(seed)

    def _plan_events(self) -> None:
        super()._plan_events()
        until_s = max(request.arrives_s for request in self.scenario.requests) + 20.0
        for _ in range(self._drawn.choice([1, 5, 40])):
            self._at(self._drawn.uniform(0, until_s), self._tune)

    def _tune(self) -> None:
        rng, limits, before = self._drawn, self.limits, self._scheduler.ceilings.rows
        rows = rng.choice([None, 0, 1, rng.randint(1, limits.max_num_seqs), 10_000])
        prefill = rng.choice([None, 0, 1, rng.randint(1, limits.prefill_step_size), 10_000])
        self._tuning = rows, prefill
        self._scheduler.tune(rows, prefill)
        after = self._scheduler.ceilings.rows
        self.lowered += after < before
        self.raised += after > before
        self._log(f"{self._now_s:8.1f} tune {self._tuning}")

    def _launch(self) -> bool:
        before, pending = len(self._scheduler.rows), len(self._pending)
        launched = super()._launch()
        after, ceilings = len(self._scheduler.rows), self._scheduler.ceilings
        assert after <= max(before, ceilings.rows), "a row was taken over the ceiling"
        self.over += before > ceilings.rows
        if len(self._pending) > pending:
            chunks, step = self._pending[-1][0].prefill, self.limits.prefill_step_size
            within = sum(len(chunk.token_ids) for chunk in chunks) <= ceilings.prefill
            assert within or (ceilings.lone and len(chunks) == 1), "more prefill than allowed"
            self.cut += any((c.start + len(c.token_ids)) % step and not c.samples for c in chunks)
        return launched

    def _start_worker(self) -> None:
        """With a model whose results may not depend on cuts, or with one whose do."""
        if self._cuts_anywhere is None:
            limits, rng = self.limits, self._drawn
            self._cuts_anywhere = not limits.prefix_whole_chunks and rng.random() < 0.6
            if self._cuts_anywhere:
                grains = [g for g in (1, 2, 4) if limits.prefill_step_size % g == 0]
                self.limits = dataclasses.replace(limits, prefill_grain=rng.choice(grains))
        super()._start_worker()
        self._scheduler.tune(*self._tuning)
