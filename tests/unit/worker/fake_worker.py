"""A real worker process over a runner that needs no MLX: `fake_worker.py --fd N`.

The path of a model says how its load goes, a prompt's first token how its steps go.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, field

from mlx_serving import errors
from mlx_serving.runtime import main
from mlx_serving.runtime.backend.model import LoadedModel
from mlx_serving.runtime.core.plan import Limits, Sampled, StepPlan, StepResult
from mlx_serving.types import ModelInfo

RAISE, ABORT, HANG = 901, 902, 903
"""First tokens of prompts that make the step fail, the process abort, the step never end."""


@dataclass
class Computed:
    result: StepResult

    def wait(self) -> StepResult:
        return self.result


@dataclass
class CountingRunner:
    """The next token is the last one plus one, so that a lost or doubled token shows."""

    last: dict[int, int] = field(default_factory=dict)
    deadly: bool = False

    def launch(self, plan: StepPlan) -> Computed:
        if self.deadly:
            os.abort()
        for start in plan.starts:
            misbehave(start.token_ids[0])
            self.last[start.seq_id] = start.token_ids[-1]
        result = StepResult(plan.step_id)
        for chunk in plan.prefill:
            if chunk.samples:
                result.sampled.append(self._next(chunk.seq_id))
        result.sampled += [self._next(row.seq_id) for row in plan.decode]
        return Computed(result)

    def _next(self, seq_id: int) -> Sampled:
        self.last[seq_id] += 1
        return Sampled(seq_id, [self.last[seq_id]])

    def foresee(self) -> tuple[()]:
        return ()

    def reset(self) -> None:
        self.last.clear()


def misbehave(token: int) -> None:
    if token == RAISE:
        raise RuntimeError("this prompt fails")
    if token == ABORT:
        print("about to abort", file=sys.stderr, flush=True)
        os.abort()
    if token == HANG:
        time.sleep(3600)


def load(model_id, path, options, on_phase):
    yield
    path = str(path)
    on_phase("loading", path)
    match path:
        case "broken":
            raise errors.ModelBroken("config.json is not there")
        case "die":
            print("no memory left", file=sys.stderr, flush=True)
            os._exit(3)
        case "hang":
            time.sleep(3600)
    how, _, marker = path.partition(":")
    if marker:  # loads once, not in a later process
        if os.path.exists(marker) and how == "once":
            os._exit(4)
        if os.path.exists(marker):
            raise errors.ModelBroken("a shard has gone")
        open(marker, "w").close()
    info = ModelInfo(
        model_id=model_id,
        path=path,
        architecture="counting",
        context_length=100_000,
        vocab_size=1 << 30,
        eos_token_ids=(),
    )
    limits = Limits(
        max_num_seqs=options.max_num_seqs,
        prefill_step_size=64,
        context_length=100_000,
        kv_capacity_tokens=100_000_000,
    )
    return LoadedModel(info, CountingRunner(deadly=how == "deadly"), limits)


if __name__ == "__main__":
    main.main(load)
