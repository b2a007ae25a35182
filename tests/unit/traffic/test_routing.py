from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from mlx_serving.traffic.routing import choose, position, takes_part

keys = st.text(max_size=40)


@given(keys, keys)
def test_a_position_is_the_same_each_time(name, key):
    assert 0 <= position(name, key) < 1
    assert position(name, key) == position(name, key)


@given(keys, st.floats(0, 1), st.floats(0, 1))
def test_who_takes_part_at_a_share_does_at_a_larger_one(key, a, b):
    small, large = sorted((a, b))
    assert takes_part("x", key, large) or not takes_part("x", key, small)
    assert takes_part("x", key, 1.0)
    assert not takes_part("x", key, 0.0)


def test_shares_are_kept_and_splits_are_independent():
    users = [f"user-{i}" for i in range(10_000)]
    both = Counter((takes_part("a", u, 0.25), takes_part("b", u, 0.25)) for u in users)
    assert abs(both[True, True] / 10_000 - 0.0625) < 0.01
    assert abs((both[True, True] + both[True, False]) / 10_000 - 0.25) < 0.015


def test_arms_by_weight():
    arms = [("a", 1.0), ("b", 2.0), ("c", 1.0)]
    found = Counter(choose("split", f"user-{i}", arms) for i in range(8_000))
    assert abs(found["a"] / 8_000 - 0.25) < 0.02
    assert abs(found["b"] / 8_000 - 0.5) < 0.02


@given(keys)
def test_an_arm_of_no_weight_gets_nobody(key):
    assert choose("split", key, [("a", 0.0), ("b", 1.0)]) == "b"
