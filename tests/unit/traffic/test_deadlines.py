from __future__ import annotations

import pytest

from mlx_serving.traffic.deadlines import TimeLimits, overdue

LIMITS = TimeLimits(queue_s=5, first_token_s=10, total_s=60)


@pytest.mark.parametrize(
    ("age_s", "begun", "answered", "code"),
    [
        (4.9, False, False, None),
        (5.0, False, False, "queue_timeout"),
        (5.0, True, False, None),
        (10.0, True, False, "timed_out"),
        (10.0, False, False, "timed_out"),
        (10.0, True, True, None),
        (60.0, True, True, "timed_out"),
    ],
)
def test_the_decision(age_s: float, begun: bool, answered: bool, code: str | None) -> None:
    error = overdue(LIMITS, age_s, begun=begun, answered=answered)
    assert (error and error.code) == code


def test_no_limits_end_nothing() -> None:
    assert overdue(TimeLimits(), 1e9, begun=False, answered=False) is None
    assert TimeLimits().next_s(0.0) is None


def test_when_to_look() -> None:
    looks = [LIMITS.next_s(age_s) for age_s in (0.0, 5.0, 7.0, 10.0, 60.0)]
    assert looks == [5, 10, 10, 60, None]
