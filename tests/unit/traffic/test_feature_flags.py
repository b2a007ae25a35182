from __future__ import annotations

from itertools import pairwise

import pytest

from mlx_serving.errors import ConfigError, ModelNotFound
from mlx_serving.traffic.feature_flags import (
    Flag,
    Switched,
    concerning,
    parse,
    parse_all,
    switched,
    with_percent,
)
from mlx_serving.traffic.routing import takes_part
from mlx_serving.types import GenerateRequest, SamplingParams, TextPrompt

KEYS = [f"user-{i}" for i in range(2000)]


@pytest.mark.parametrize(
    ("text", "flag"),
    [
        ("fast=10% use=b", Flag("fast", 0.1, use="b")),
        ("fast=12.5%  model=a  use=b", Flag("fast", 0.125, model="a", use="b")),
        ("v2.b_x-1=0% max_tokens=256", Flag("v2.b_x-1", 0.0, max_tokens=256)),
        ("all=100% timeout=0.5", Flag("all", 1.0, timeout_s=0.5)),
    ],
)
def test_texts(text, flag):
    assert parse(text) == flag


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "NAME=PERCENT%"),
        ("fast", "NAME=PERCENT%"),
        ("fast=10 use=b", "NAME=PERCENT%"),
        ("fast=101% use=b", "NAME=PERCENT%"),
        ("f st=10% use=b", "NAME=PERCENT%"),
        ("fast=10%", "switches nothing"),
        ("fast=10% model=a", "switches nothing"),
        ("fast=10% use=", "none of"),
        ("fast=10% top_p=1", "none of"),
        ("fast=10% use=b use=c", "given twice"),
        ("fast=10% max_tokens=0", "above 0"),
        ("fast=10% max_tokens=x", "above 0"),
        ("fast=10% timeout=0", "above 0"),
        ("fast=10% timeout=1e3", "above 0"),
    ],
)
def test_what_is_no_flag(text, says):
    with pytest.raises(ConfigError, match=says) as caught:
        parse(text)
    assert caught.value.param == "feature_flags"


def test_models_are_resolved_and_names_are_unique():
    names = {"a": "a", "alias": "b"}

    def served(name: str) -> str:
        if name not in names:
            raise ModelNotFound(name)
        return names[name]

    (found,) = parse_all(["fast=10% model=a use=alias"], served)
    assert (found.model, found.use) == ("a", "b")
    with pytest.raises(ModelNotFound):
        parse_all(["fast=10% use=c"], served)
    with pytest.raises(ConfigError, match="given twice"):
        parse_all(["fast=10% use=a", "fast=20% use=a"], served)


def test_a_higher_percentage_only_adds_users_and_each_stays_put():
    def reached(percent: float) -> set[str]:
        flags = [parse(f"fast={percent}% use=b")]
        return {key for key in KEYS if switched(flags, "a", key).flags}

    shares = [reached(percent) for percent in (0, 5, 10, 50, 100)]
    assert all(a <= b for a, b in pairwise(shares))
    assert [len(s) for s in (shares[0], shares[-1])] == [0, len(KEYS)]
    assert 120 <= len(shares[2]) <= 280
    # The same hash as a rollout's of that name.
    assert shares[3] == {key for key in KEYS if takes_part("fast", key, 0.5)}


def test_flags_are_independent_and_the_first_has_its_way():
    flags = [
        Flag("one", 1.0, use="b", max_tokens=5),
        Flag("two", 1.0, use="c", timeout_s=2.0),
        Flag("other", 1.0, model="x", use="d"),
    ]
    assert switched(flags, "a", "k") == Switched(("one", "two"), "b", 5, 2.0)
    assert concerning(flags, "a") == ["one", "two"]
    assert switched(flags, "x", "k").flags == ("one", "two", "other")
    halves = [Flag("one", 0.5, use="b"), Flag("two", 0.5, use="c")]
    kinds = {switched(halves, "a", key).flags for key in KEYS}
    assert kinds == {(), ("one",), ("two",), ("one", "two")}


def request(**fields) -> GenerateRequest:
    sampling = SamplingParams(min_tokens=fields.pop("min_tokens", 0))
    prompt = TextPrompt(text="x")
    return GenerateRequest(request_id="r", model="a", prompt=prompt, sampling=sampling, **fields)


@pytest.mark.parametrize(
    ("given", "max_tokens", "timeout_s"),
    [
        ({}, 5, 2.0),
        ({"max_tokens": 9}, 9, 2.0),
        ({"timeout_s": 9.0}, 5, 9.0),
        ({"min_tokens": 8}, 8, 2.0),
    ],
)
def test_defaults_fill_what_a_request_leaves_open(given, max_tokens, timeout_s):
    found = Switched(max_tokens=5, timeout_s=2.0).applied(request(**given))
    assert (found.max_tokens, found.timeout_s) == (max_tokens, timeout_s)


def test_without_a_flag_a_request_is_as_it_was():
    given = request()
    assert Switched().applied(given) is given


def test_another_percentage():
    text = with_percent("fast=10% model=a use=b", 12.5)
    assert text == "fast=12.5% model=a use=b"
    assert parse(text).share == 0.125
