"""A disk for the fake runner: slow, and sometimes broken, as the dice say. It outlives its runners."""

from __future__ import annotations

import random
from collections import deque

from mlx_serving.runtime.core.disk import (
    BlockFile,
    DiskEvent,
    Found,
    Lost,
    NotWritten,
    Read,
    Scanned,
    Written,
)
from mlx_serving.runtime.core.plan import Limits, StepPlan

Content = tuple[str | None, tuple[int, ...]]
"""Salt and whole prefix."""
FOREIGN = "other model"


class FakeDisk:
    """`faults`: how likely it is that a read or a write fails."""

    def __init__(self, limits: Limits, rng: random.Random, faults: float) -> None:
        self.limits = limits
        self.files: dict[BlockFile, Content] = {}
        self.others: dict[str, int] = {}
        self._rng = rng
        self._faults = faults
        self.begin_anew()

    def begin_anew(self) -> None:
        """The worker has gone; what it had not written is lost."""
        self.staged: dict[bytes, Content] = {}
        self._reads: deque[BlockFile] = deque()
        self._writes: deque[tuple[BlockFile, Content]] = deque()
        if self._rng.random() < 0.5 and not self.others:
            size = self.limits.disk_block_bytes
            self.others = {f"{FOREIGN} {i}": size for i in range(self._rng.randrange(4))}

    def scan(self) -> Scanned:
        size = self.limits.disk_block_bytes
        mine = [Found(f.key.hex(), size, self._rng.uniform(0, 99), f) for f in self.files]
        others = [Found(n, b, self._rng.uniform(0, 99)) for n, b in self.others.items()]
        return Scanned((*mine, *others))

    def delete_all(self) -> None:
        self.files.clear()
        self.others.clear()

    def before(self, plan: StepPlan, blocks: dict[int, Content]) -> None:
        """What a plan wants before its starts."""
        orders = plan.disk
        for key in orders.forget:
            del self.staged[key]
        for key, block in orders.fill:
            blocks[block] = self.staged.pop(key)
        for file in orders.drop:
            if isinstance(file, str):
                self.others.pop(file, None)
                self.files = {f: c for f, c in self.files.items() if f.key.hex() != file}
            else:
                self.files.pop(file, None)
        for file in orders.read:
            assert not any(file.key == other.key for other in self._reads), "read twice"
            self._reads.append(file)

    def after(self, plan: StepPlan, blocks: dict[int, Content]) -> None:
        """What it wants after its publications."""
        self._writes += [(file, blocks[block]) for file, block in plan.disk.write]

    def events(self, *, wait: bool) -> list[DiskEvent]:
        """What it has got done, which is as it pleases."""
        done: list[DiskEvent] = []
        some = self._rng.randrange(4)
        for _ in range(max(some, wait)):
            if self._reads:
                done.append(self._read(self._reads.popleft()))
            elif self._writes:
                done.append(self._write(*self._writes.popleft()))
        if self._rng.random() < 0.02:
            done.append(self.scan())
        return done

    def _read(self, file: BlockFile) -> DiskEvent:
        if self._rng.random() < self._faults:
            self.files.pop(file, None)
        if file not in self.files:
            return Lost(file.key)
        self.staged[file.key] = self.files[file]
        return Read(file.key)

    def _write(self, file: BlockFile, content: Content) -> DiskEvent:
        if self._rng.random() < self._faults / 5:
            return NotWritten(file.key)
        self.files[file] = content
        size = self.limits.disk_block_bytes
        used = len(self.files) * size + sum(self.others.values())
        assert used <= self.limits.disk_bytes, "the folder is larger than it may be"
        return Written(file.key, size)
