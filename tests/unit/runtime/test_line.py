from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from mlx_serving.runtime.core.plan import StepPlan, StepResult
from mlx_serving.runtime.line import Line

PLAN = StepPlan(step_id=0)


@dataclass
class Device:
    """Computes steps one after another, each when it is waited for."""

    now_s: float = 0.0
    waited: list[str] = field(default_factory=list)

    def step(self, name: str, takes_s: float, error: Exception | None = None):
        device = self

        class Pending:
            def wait(self) -> StepResult:
                device.now_s += takes_s
                device.waited.append(name)
                if error is not None:
                    raise error
                return StepResult(0, [])

        return Pending()


def test_a_step_s_own_time_is_without_those_before_it():
    device = Device()
    line = Line(lambda: device.now_s)
    a = [line.join(PLAN, device.step("a", 3.0)), line.join(PLAN, device.step("a2", 4.0))]
    line.wait(a[0])
    b = line.join(PLAN, device.step("b", 1.0))
    line.wait(b)
    assert device.waited == ["a", "a2", "b"]
    line.wait(a[1])
    assert [step.own_s for step in (*a, b)] == [3.0, 4.0, 1.0]
    assert device.waited == ["a", "a2", "b"]


def test_a_device_that_was_idle_began_with_the_launch():
    device = Device()
    line = Line(lambda: device.now_s)
    line.wait(line.join(PLAN, device.step("a", 3.0)))
    device.now_s = 100.0
    step = line.join(PLAN, device.step("b", 2.0))
    line.wait(step)
    assert step.own_s == 2.0


def test_a_step_that_fails_fails_its_own_model():
    device = Device()
    line = Line(lambda: device.now_s)
    bad = line.join(PLAN, device.step("a", 1.0, RuntimeError("no")))
    good = line.join(PLAN, device.step("b", 1.0))
    assert line.wait(good) == StepResult(0, [])
    with pytest.raises(RuntimeError, match="no"):
        line.wait(bad)


def test_who_has_left_is_not_waited_for():
    device = Device()
    line = Line(lambda: device.now_s)
    gone = line.join(PLAN, device.step("a", 1.0))
    here = line.join(PLAN, device.step("b", 1.0))
    line.leave([gone])
    line.wait(here)
    assert device.waited == ["b"]
