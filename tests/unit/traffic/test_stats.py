from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from mlx_serving.traffic.stats import Moments, anytime, t_quantile, welch

values = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=40)


def moments(numbers) -> Moments:
    found = Moments()
    for number in numbers:
        found.add(number)
    return found


@given(values)
def test_moments_are_the_sample_s(numbers):
    found = moments(numbers)
    assert found.n == len(numbers)
    assert found.mean == pytest.approx(sum(numbers) / len(numbers), abs=1e-6)
    expected = sum((x - found.mean) ** 2 for x in numbers) / (len(numbers) - 1)
    assert found.variance == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_welch_is_scipy_s():
    rng = random.Random(4)
    for _ in range(200):
        a = [rng.gauss(0, 1) for _ in range(rng.randint(2, 60))]
        b = [rng.gauss(0.4, 3) for _ in range(rng.randint(2, 60))]
        ours = welch([(moments(a), moments(b))])
        theirs = scipy_stats.ttest_ind(b, a, equal_var=False)
        interval = theirs.confidence_interval(0.95)
        assert ours is not None
        assert ours.t == pytest.approx(theirs.statistic, rel=1e-9)
        assert ours.p == pytest.approx(theirs.pvalue, rel=1e-9)
        assert ours.df == pytest.approx(theirs.df, rel=1e-9)
        assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high), rel=1e-8)


def test_cohen_s_d_is_the_difference_in_pooled_deviations():
    found = welch([(moments([1, 2, 3, 4, 5]), moments([3, 4, 5, 6, 7]))])
    assert found is not None
    assert found.d == pytest.approx(2 / math.sqrt(2.5))


@pytest.mark.parametrize("a, b", [([1.0], [1.0, 2.0]), ([1.0, 2.0], []), ([3.0, 3.0], [4.0, 4.0])])
def test_nothing_to_compare(a, b):
    assert welch([(moments(a), moments(b))]) is None


def test_strata_with_different_means_are_compared_each_with_itself():
    """Of numbers that only differ between strata, nothing is left; alike ones add up."""
    rng = random.Random(6)
    a = [rng.gauss(0, 1) for _ in range(40)]
    shifted = [x + 50 for x in a]
    found = welch([(moments(a), moments(a[:20])), (moments(shifted[:20]), moments(shifted))])
    assert found is not None
    assert abs(found.difference) < 0.5 and found.p > 0.05
    apart = [(moments([x + s for x in a]), moments([x + s + 1 for x in a])) for s in (0, 50)]
    one, both = welch(apart[:1]), welch(apart)
    assert one is not None and both is not None
    assert both.difference == pytest.approx(1) == pytest.approx(one.difference)
    assert both.t == pytest.approx(math.sqrt(2) * one.t)
    assert both.df == pytest.approx(2 * one.df)
    assert both.d == pytest.approx(one.d)


@given(st.floats(0.5, 0.9999), st.floats(1, 500))
def test_quantiles_are_scipy_s(q, df):
    assert t_quantile(q, df) == pytest.approx(scipy_stats.t.ppf(q, df), rel=1e-6, abs=1e-6)


def _ever_excludes(rng: random.Random, truth: float, alpha: float, looks: int) -> bool:
    a, b = Moments(), Moments()
    for _ in range(looks):
        for _ in range(5):
            a.add(rng.gauss(0, 1))
            b.add(rng.gauss(truth, 2))
        found = anytime([(a, b)], alpha=alpha, effect=0.2)
        if found is not None and not found.low <= truth <= found.high:
            return True
    return False


def test_the_bound_holds_at_every_look_together():
    """200 samples, each looked at 100 times: a test of fixed size would exclude the truth in
    several times alpha of them."""
    rng = random.Random(1)
    wrong = sum(_ever_excludes(rng, 0.3, 0.2, 100) for _ in range(200))
    assert wrong <= 0.2 * 200


def test_a_difference_is_seen_in_the_end():
    rng = random.Random(2)
    a, b = (
        moments(rng.gauss(0, 1) for _ in range(2000)),
        moments(rng.gauss(0.3, 1) for _ in range(2000)),
    )
    found = anytime([(a, b)], alpha=0.05, effect=0.2)
    assert found is not None
    assert 0 < found.low < 0.3 < found.high


def test_strata_are_compared_each_with_itself():
    """A busy hour in which the variant has a larger share is no difference between the arms."""
    rng = random.Random(3)
    quiet = (
        moments(rng.gauss(0, 0.1) for _ in range(900)),
        moments(rng.gauss(0, 0.1) for _ in range(100)),
    )
    busy = (
        moments(rng.gauss(5, 0.1) for _ in range(500)),
        moments(rng.gauss(5, 0.1) for _ in range(500)),
    )
    found = anytime([quiet, busy], alpha=0.05, effect=0.05)
    assert found is not None
    assert found.low < 0 < found.high
    assert abs(found.difference) < 0.02


def test_few_samples_say_nothing():
    few = moments(range(10)), moments(range(10))
    assert anytime([few], alpha=0.05, effect=0.1) is None


def test_samples_that_are_all_alike_are_not_certain():
    none, all_ = moments([0.0] * 30), moments([0.0] * 30)
    found = anytime([(none, all_)], alpha=0.05, effect=0.02, floor=0.01)
    assert found is not None
    assert found.low < -0.02 < 0.02 < found.high


def test_moments_joined_are_those_of_all_numbers() -> None:
    one, other, both = Moments(), Moments(), Moments()
    for i, value in enumerate((1.0, 4.0, -2.0, 7.5, 3.0)):
        (one if i < 2 else other).add(value)
        both.add(value)
    one.join(other)
    one.join(Moments())
    assert (one.n, one.mean) == (both.n, pytest.approx(both.mean))
    assert one.variance == pytest.approx(both.variance)
