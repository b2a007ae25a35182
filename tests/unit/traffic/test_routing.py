from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from mlx_serving.traffic.routing import position, takes_part

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
