from __future__ import annotations

import pytest

from mlx_serving.errors import RateLimited
from mlx_serving.traffic.allowance import Allowance, Left, Limits, refusal

ALL = Limits(max_concurrent=2, requests_per_min=30, tokens_per_min=600)


@pytest.mark.parametrize(
    ("left", "retry_after_s", "names"),
    [
        (Left(open_requests=1, requests=1.0, tokens=0.1), None, ""),
        (Left(open_requests=2, requests=9.0, tokens=9.0), 1.0, "2 requests at once"),
        (Left(open_requests=0, requests=0.5, tokens=9.0), 1.0, "30 requests a minute"),
        (Left(open_requests=0, requests=1.0, tokens=-9.0), 1.0, "600 tokens a minute"),
    ],
)
def test_the_first_limit_that_is_reached_is_named(
    left: Left, retry_after_s: float | None, names: str
) -> None:
    error = refusal("ci", ALL, left)
    if retry_after_s is None:
        assert error is None
        return
    assert error is not None
    assert (error.status, error.code) == (429, "rate_limit_exceeded")
    assert error.retry_after_s == pytest.approx(retry_after_s)
    assert names in error.message and "'ci'" in error.message


def test_no_limits_refuse_nothing() -> None:
    assert refusal("ci", Limits(), Left(10**6, -1e9, -1e9)) is None


def test_requests_fill_up_steadily() -> None:
    allowance = Allowance("ci", Limits(requests_per_min=2))
    for _ in range(2):
        allowance.enter(100.0)
    with pytest.raises(RateLimited) as caught:
        allowance.enter(100.0)
    assert caught.value.retry_after_s == pytest.approx(30)
    allowance.enter(130.0)
    with pytest.raises(RateLimited):
        allowance.enter(130.0)
    for _ in range(2):
        allowance.enter(10_000.0)
    with pytest.raises(RateLimited):
        allowance.enter(10_000.0)


def test_tokens_may_run_into_debt_and_are_paid_back() -> None:
    allowance = Allowance("ci", Limits(tokens_per_min=60))
    allowance.enter(0.0)
    allowance.spend(120, 0.0)
    with pytest.raises(RateLimited) as caught:
        allowance.enter(0.0)
    assert caught.value.retry_after_s == pytest.approx(61)
    with pytest.raises(RateLimited):
        allowance.enter(59.0)
    allowance.enter(61.0)


def test_who_leaves_makes_room() -> None:
    allowance = Allowance("ci", Limits(max_concurrent=1))
    allowance.enter(0.0)
    with pytest.raises(RateLimited):
        allowance.enter(0.0)
    allowance.leave()
    allowance.enter(0.0)
