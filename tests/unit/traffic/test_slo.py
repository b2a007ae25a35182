from __future__ import annotations

import pytest

from mlx_serving.errors import ConfigError
from mlx_serving.telemetry.events import RequestFinished
from mlx_serving.traffic.slo import (
    AtRisk,
    Burn,
    Level,
    Ok,
    Recovering,
    Violated,
    parse,
    step,
)
from mlx_serving.traffic.window import ACCURACY
from mlx_serving.types import Priority, Usage


def finished(**fields) -> RequestFinished:
    given = {"ttft_ms": 20.0, "duration_ms": 1020.0, "tpot_ms": 10.0, "outcome": "stop", **fields}
    usage = Usage(prompt_tokens=5, completion_tokens=102)
    return RequestFinished(**{"request_id": "r", "model_id": "m", "usage": usage, **given})


@pytest.mark.parametrize(
    ("text", "metric", "budget", "limit"),
    [
        ("ttft p95 < 500ms", "ttft", 0.05, 500),
        ("ttft p99.9 < 2s", "ttft", 0.001, 2000),
        ("tpot p90<40ms", "tpot", 0.1, 40),
        ("queue p95 < 200ms", "queue", 0.05, 200),
        ("duration p50 < 1.5s", "duration", 0.5, 1500),
        ("throughput p95 > 20tok/s", "throughput", 0.05, 20),
        ("errors < 1%", "errors", 0.01, 0),
    ],
)
def test_promises(text, metric, budget, limit):
    found = parse(text)
    assert (found.metric, found.limit) == (metric, limit)
    assert found.budget == pytest.approx(budget)


def test_whom_a_promise_is_for():
    found = parse("ttft p95 < 1s model=m class=high key=team over=30s,300s")
    assert (found.model, found.priority, found.client) == ("m", Priority.HIGH, "team")
    assert (found.short_s, found.long_s) == (30, 300)
    other = parse("ttft p95 < 1s over=30s/300s")
    assert (other.short_s, other.long_s) == (30, 300)
    assert found.missed(finished(ttft_ms=2e3)) is None
    mine = finished(ttft_ms=2e3, priority=Priority.HIGH, client="team")
    assert found.missed(mine) is True


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ttft < 500ms",
        "ttft p95 < 500",
        "ttft p95 > 500ms",
        "throughput p95 < 20tok/s",
        "throughput p95 > 20ms",
        "ttft p95 < 20tok/s",
        "ttft p100 < 1s",
        "ttft p0 < 1s",
        "errors < 0%",
        "ttft p95 < 1s class=urgent",
        "ttft p95 < 1s over=600s,60s",
        "ttft p95 < 1s model=",
        "ttft p95 < 1s colour=red",
    ],
)
def test_what_is_no_promise(text):
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert caught.value.param == "slo"
    assert text in caught.value.message


@pytest.mark.parametrize(
    ("text", "fields", "missed"),
    [
        ("ttft p95 < 10ms", {}, True),
        ("ttft p95 < 30ms", {}, False),
        ("ttft p95 < 30ms", {"ttft_ms": None}, None),
        ("tpot p95 < 9ms", {}, True),
        ("queue p95 < 9ms", {"queue_ms": 10.0}, True),
        ("queue p95 < 9ms", {"queue_ms": 0.0}, False),
        ("queue p95 < 9ms", {}, None),
        ("duration p95 < 1s", {}, True),
        ("throughput p95 > 99tok/s", {}, False),
        ("throughput p95 > 101tok/s", {}, True),
        ("errors < 1%", {"outcome": "worker_died"}, True),
        ("errors < 1%", {"outcome": "length"}, False),
        ("errors < 1%", {"outcome": "cancelled"}, None),
        ("ttft p95 < 10ms", {"outcome": "worker_died"}, None),
        ("ttft p95 < 10ms model=other", {}, None),
    ],
)
def test_what_misses_it(text, fields, missed):
    assert parse(text).missed(finished(**fields)) is missed


def burn(short: float, long: float, requests: int = 100) -> Burn:
    return Burn(short, long, requests)


@pytest.mark.parametrize(
    ("state", "given", "expected"),
    [
        (Ok(), burn(0.9, 0.9), Ok()),
        (Ok(), burn(0.5, 1.2), AtRisk()),
        (Ok(), burn(5, 1.5), AtRisk()),
        (Ok(), burn(5, 0.9), Ok()),
        (Ok(), burn(3, 3), Violated(50)),
        (Ok(), burn(3, 3, requests=3), Ok()),
        (AtRisk(), burn(0.9, 0.9), AtRisk()),
        (AtRisk(), burn(0.7, 0.7), Ok()),
        (AtRisk(), burn(2, 2), Violated(50)),
        (Violated(10), burn(1.5, 5), Violated(10)),
        (Violated(10), burn(0.5, 5), Recovering(10, 50)),
        (Violated(10), burn(0, 5, requests=0), Recovering(10, 50)),
        (Recovering(10, 40), burn(0.5, 5), Recovering(10, 40)),
        (Recovering(10, -10), burn(0.5, 5), Ok()),
        (Recovering(10, 40), burn(1.5, 5), Recovering(10, 50)),
        (Recovering(10, 40), burn(2.5, 5), Violated(10)),
    ],
)
def test_states(state, given, expected):
    assert step(state, given, 50.0) == expected


def test_a_level_tells_of_its_changes():
    level, changes = Level(parse("ttft p90 < 10ms over=10s,100s")), []
    for second in range(40):
        level.add(finished(), second)
        level.add(finished(ttft_ms=1.0 if second < 20 else 50.0), second)
        level.look(second, lambda level, before: changes.append((before.name, level.state.name)))
    assert changes[-1][1] == "violated"
    assert level.burn(39).short == pytest.approx(10.0)


@pytest.mark.parametrize(
    ("text", "fields", "figure"),
    [
        ("ttft p90 < 10ms", {"ttft_ms": 200.0}, 200.0),
        ("throughput p90 > 50tok/s", {"duration_ms": 10_200.0}, 10.0),
        ("errors < 1%", {"outcome": "worker_died"}, 0.2),
        ("queue p90 < 1ms", {"outcome": "worker_died"}, None),
    ],
)
def test_what_the_percentile_is_now(text, fields, figure):
    level = Level(parse(text))
    assert level.figure(0) is None
    for i in range(50):
        level.add(finished(**(fields if i < 10 else {})), i / 10)
    found = level.figure(5)
    assert found == (figure and pytest.approx(figure, rel=1.01 * ACCURACY))


def test_figures_are_said_in_their_units():
    texts = ("ttft p90 < 10ms", "throughput p90 > 50tok/s", "errors < 1%")
    assert [parse(text).say(0.25) for text in texts] == ["0 ms", "0.2 tok/s", "25.0 %"]
    assert [parse(text).plain(250) for text in texts] == [0.25, 250, 250]
