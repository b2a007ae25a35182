"""A scheduler, a runner and a folder of block files: a worker that can be started again."""

from __future__ import annotations

from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any

from mlx_serving.runtime.backend.disk import DiskFolder, Files
from mlx_serving.runtime.backend.kv_layers import KVLayer, MakeKVLayer
from mlx_serving.runtime.backend.runner import MLXRunner
from mlx_serving.runtime.backend.tier import Tier, to_device
from mlx_serving.runtime.core import invariants
from mlx_serving.runtime.core.plan import Limits
from mlx_serving.runtime.core.scheduler import Emitted, Scheduler
from mlx_serving.runtime.core.sequence import Sequence
from mlx_serving.types import SamplingParams
from model import zoo
from model.driver import make_runner

ROWS = 4
GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, logprobs=2)

Answer = tuple[list[int], list[Any], int]
"""Tokens, log-probabilities, cached tokens."""


class Server:
    """Outlives its sequences. Time stands still for it, so that it always waits for a read."""

    def __init__(
        self,
        model: Any,
        limits: Limits,
        folder: Path | None = None,
        *,
        identity: str = "0" * 32,
        files: Files | None = None,
        attention: MakeKVLayer = KVLayer,
    ) -> None:
        self.runner: MLXRunner = make_runner(model, zoo.VOCAB, rows=ROWS, attention=attention)
        if limits.prefix_blocks:
            self.runner.store.open_pool(limits.prefix_blocks, limits.prefix_block_tokens)
        on_disk = None
        self.disk: DiskFolder | None = None
        if folder is not None:
            self.disk = DiskFolder(
                folder, identity, limits.disk_bytes, to_device=to_device, files=files
            )
            self.runner.keep_on(Tier(self.disk, self.runner.store))
            on_disk = self.disk.open()
        self.scheduler = Scheduler(limits, on_disk)
        self.now_s = 0.0
        self.prefilled = 0
        self._seq_id = 0

    @property
    def counts(self) -> Any:
        return self.scheduler.sharing.disk.counts

    def answer(self, *prompts: Items[int], salt: str | None = None) -> list[Answer]:
        """All of them at once, two steps deep."""
        first = self._seq_id
        for prompt in prompts:
            self.scheduler.add(
                Sequence(
                    seq_id=self._seq_id,
                    tokens=list(prompt),
                    prompt_len=len(prompt),
                    sampling=GREEDY,
                    salt=salt,
                )
            )
            self._seq_id += 1
        emitted = self._run()
        answers: list[Answer] = []
        for seq_id in range(first, self._seq_id):
            mine = [one for one in emitted if one.seq_id == seq_id]
            tokens = [token for one in mine for token in one.token_ids]
            logprobs = [value for one in mine for value in one.logprobs or []]
            answers.append((tokens, logprobs, mine[0].cached_tokens))
        return answers

    def settle(self) -> None:
        """Until the disk has done what it was told."""
        disk = self.scheduler.sharing.disk
        while self.disk is not None and (disk.writing or disk.behind):
            self._run()
            for event in self.disk.events(wait=True):
                disk.take(event)
        invariants.check(self.scheduler)

    def stop(self) -> None:
        self.settle()
        assert self.disk is not None
        self.disk.close(timeout_s=60)

    def _run(self) -> list[Emitted]:
        emitted: list[Emitted] = []
        pending = []
        while self.scheduler.has_work:
            plan = self.scheduler.schedule(self.now_s) if len(pending) < 2 else None
            if plan is not None:
                self.prefilled += plan.prefill_tokens
                pending.append(self.runner.launch(plan))
            elif pending:
                emitted += self.scheduler.apply(pending.pop(0).wait())
            invariants.check(self.scheduler)
        return emitted
