from __future__ import annotations

import pytest

from mlx_serving.errors import Draining, Overloaded
from mlx_serving.traffic.admission import Admission, class_bounds
from mlx_serving.types import Priority


def test_a_class_that_is_full_does_not_keep_the_others_out() -> None:
    admission = Admission(class_bounds(2, ("low=1",)))
    admission.enter(0.0, Priority.LOW)
    with pytest.raises(Overloaded, match="low requests is full"):
        admission.enter(0.0, Priority.LOW)
    for priority in (Priority.NORMAL, Priority.NORMAL, Priority.CRITICAL):
        admission.enter(0.0, priority)
    with pytest.raises(Overloaded):
        admission.enter(0.0)
    assert admission.open_requests == 4
    admission.leave(1.0, Priority.LOW)
    admission.enter(1.0, Priority.LOW)


def test_a_bound_of_nothing_closes_a_class() -> None:
    admission = Admission(class_bounds(5, ("low=0", "high=7")))
    assert admission.bounds[Priority.HIGH] == 7 and admission.bounds[Priority.CRITICAL] == 5
    with pytest.raises(Overloaded):
        admission.enter(0.0, Priority.LOW)


def test_retry_after_follows_the_measured_rate() -> None:
    admission = Admission(class_bounds(20, ()))
    for _ in range(20):
        admission.enter(0.0)
    admission.leave(10.0)
    admission.leave(14.0)
    admission.enter(14.0)
    admission.enter(14.0)
    with pytest.raises(Overloaded) as caught:
        admission.enter(14.0)
    assert caught.value.retry_after_s == 8.0


def test_draining_refuses_every_class() -> None:
    admission = Admission(class_bounds(5, ()))
    admission.drain(30.0)
    with pytest.raises(Draining) as caught:
        admission.enter(10.0, Priority.CRITICAL)
    assert caught.value.retry_after_s == 20.0
