"""The parts of a sequence's way to its first token, by a clock that is told."""

from __future__ import annotations

import pytest

from mlx_serving.runtime.stages import Stages


class Now:
    def __init__(self) -> None:
        self.s = 10.0

    def __call__(self) -> float:
        return self.s


def test_each_part_is_told_once() -> None:
    now = Now()
    stages = Stages(now)
    with stages.measure("grammar"):
        now.s += 0.002
    stages.queued(1)
    now.s += 0.5
    stages.started(1, 10.4)
    now.s += 0.25
    stages.first_token(1)
    now.s += 0.1
    stages.first_token(1)
    stages.started(1, None)
    stages.first_token(1)
    told = stages.take()
    assert [stage for stage, _ in told] == ["grammar", "queue", "disk", "prefill"]
    assert [ms for _, ms in told] == pytest.approx([2, 500, 102, 250])
    assert stages.take() == []


def test_who_leaves_is_forgotten_and_a_failure_is_no_measure() -> None:
    now = Now()
    stages = Stages(now)
    stages.queued(1)
    stages.forget(1)
    stages.started(1, None)
    stages.queued(2)
    stages.started(2, None)
    stages.forget(2)
    stages.first_token(2)
    with pytest.raises(ValueError, match="bad"), stages.measure("grammar"):
        raise ValueError("bad")
    assert [stage for stage, _ in stages.take()] == ["queue"]
