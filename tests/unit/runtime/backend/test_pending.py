"""A launched step's result: line by line, once its draws are there."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_serving.errors import InvalidRequest
from mlx_serving.runtime.backend.pending import Forward, MLXPendingStep
from mlx_serving.runtime.backend.sampler import Draw
from mlx_serving.runtime.core.disk import Read
from mlx_serving.runtime.core.plan import Sampled
from mlx_serving.types import TokenLogprob


def test_lines_that_are_nobodys_are_left_out() -> None:
    error = InvalidRequest("no further")
    draw = Draw(mx.array([4, 5, 6]), [(2, 0)], mx.array([-0.5]))
    forward = Forward(None, [0, None, 2], [7, None, 9], [1, 0, 1], draw, {0: error})
    pending = MLXPendingStep(3, [forward], {8: mx.array([1.0, 2.0])}, [], _never, list)
    result = pending.wait()
    assert result.step_id == 3
    assert result.sampled == [
        Sampled(7, [4], error=error),
        Sampled(9, [6], [TokenLogprob(-0.5)]),
        Sampled(8, [], vector=np.array([1, 2], "<f4").tobytes()),
    ]


def test_what_waits_for_a_mask_is_drawn_at_last() -> None:
    forward = Forward(None, [0], [7], [1])

    def settle() -> None:
        forward.draw = Draw(mx.array([4]), [])

    told = [Read(b"key")]
    pending = MLXPendingStep(0, [forward], {}, [mx.zeros(())], settle, lambda: told)
    result = pending.wait()
    assert (result.sampled, result.disk) == ([Sampled(7, [4])], told)


def _never() -> None:
    raise AssertionError("its draws are made")
