"""A model in the loop, stepped by hand."""

from __future__ import annotations

import msgspec

from mlx_serving.runtime.compiles import Compiles
from mlx_serving.runtime.model import Model
from mlx_serving.types import Priority
from unit.runtime.test_loop import Runner, loaded, submit


def test_one_step_is_in_flight_while_critical_requests_come_beside_others() -> None:
    compiles = Compiles(lambda: None)
    one = loaded("m")
    model, runner = Model(one, 2, compiles=compiles), one.runner
    assert isinstance(runner, Runner)
    model.submit(submit(1, 10, max_tokens=50))
    for _ in range(3):
        model.step()
        assert runner.in_flight == 1  # a second one was launched before the first was waited for
    model.submit(msgspec.structs.replace(submit(2, 20), priority=Priority.CRITICAL))
    for _ in range(6):
        model.step()
        assert runner.in_flight == 0
    assert model.sequences == {1}
    compiles.close()
