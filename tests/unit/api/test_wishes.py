from __future__ import annotations

import pytest

from mlx_serving.api import wishes
from mlx_serving.api.exchange import Exchange
from mlx_serving.errors import InvalidRequest
from mlx_serving.types import GenerateRequest, Priority, SamplingParams, TextPrompt


def applied(headers: dict[str, str], **fields: object) -> GenerateRequest:
    scope = {
        "method": "POST",
        "path": "/v1/completions",
        "headers": [(k.encode(), v.encode("latin-1")) for k, v in headers.items()],
    }
    request = GenerateRequest(
        request_id="r",
        model="m",
        prompt=TextPrompt(text="x"),
        sampling=SamplingParams(),
        **fields,
    )
    return wishes.apply(Exchange(scope, None, None), request)


@pytest.mark.parametrize(
    ("value", "caching"),
    [
        ("no-cache", "refresh"),
        ("No-Store", "none"),
        ("max-age=0, no-cache, no-store", "none"),
        ("max-age=60", "use"),
        ("", "use"),
    ],
)
def test_cache_control(value, caching) -> None:
    assert applied({"cache-control": value}).caching == caching


@pytest.mark.parametrize(
    ("value", "priority"),
    [("critical", Priority.CRITICAL), (" low ", Priority.LOW), ("-3", Priority.HIGH), ("0", 2)],
)
def test_x_priority(value, priority) -> None:
    assert applied({"x-priority": value}).priority == priority


def test_the_body_says_more_than_a_header() -> None:
    request = applied(
        {"x-priority": "low", "x-timeout": "9"}, priority=Priority.HIGH, timeout_s=3.0
    )
    assert (request.priority, request.timeout_s) == (Priority.HIGH, 3.0)
    assert applied({"x-timeout": "2.5"}).timeout_s == 2.5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("x-priority", v) for v in ("urgent", "LOW", "1.5", "", "\xff")),
        *(("x-timeout", v) for v in ("0", "-1", "soon", "nan", "inf", "86401", "\xff")),
    ],
)
def test_a_wrong_header_is_named(name, value) -> None:
    with pytest.raises(InvalidRequest) as caught:
        applied({name: value})
    assert caught.value.param == name
