from __future__ import annotations

import json
import math

import pytest

from mlx_serving.errors import InvalidRequest, RequestNotFound
from mlx_serving.telemetry.events import Company, Met, RequestFinished
from mlx_serving.traffic.rollout import Stage
from mlx_serving.traffic.rollouts import FAILED, Arm, Rollouts, Score, Spec, measured
from mlx_serving.types import Usage

OK = {"error": 0.0, "empty": 0.0, "capped": 0.0}
STAGES = (Stage(0.5, min_samples=30, min_s=0), Stage(1.0, min_samples=10, min_s=0))


def spec(**fields) -> Spec:
    return Spec(**{"name": "c", "model": "old", "variant": "new", "stages": STAGES, **fields})


def feed(rollouts: Rollouts, n: int, *, old=OK, new=OK) -> None:
    for _ in range(n):
        rollouts.observe(Arm("c", "old", False), old)
        rollouts.observe(Arm("c", "new", True), new)


def arms(rollouts: Rollouts) -> set[str]:
    found = [rollouts.arm("old", f"user-{i}") for i in range(200)]
    return {arm.model if arm else "none" for arm in found}


def test_traffic_is_split_and_then_all_the_variant_s(tmp_path):
    changes = []
    rollouts = Rollouts(tmp_path / "r.json", lambda r: changes.append((r.status, r.stage)))
    assert rollouts.arm("old", "anybody") is None
    rollouts.start(spec())
    assert arms(rollouts) == {"old", "new"}
    assert rollouts.arm("new", "anybody") is None  # asked for by its own name
    feed(rollouts, 30)
    assert rollouts.get("c").stage == 1
    feed(rollouts, 10)
    assert rollouts.get("c").status == "promoted"
    assert arms(rollouts) == {"new"}
    assert changes == [("running", 0), ("running", 1), ("promoted", 1)]


def test_a_worse_variant_is_rolled_back_and_stays_so_over_a_restart(tmp_path):
    rollouts = Rollouts(tmp_path / "r.json")
    rollouts.start(spec())
    feed(rollouts, 60, new=FAILED)
    assert rollouts.get("c").status == "rolled_back"
    assert arms(rollouts) == {"none"}
    again = Rollouts(tmp_path / "r.json")
    assert again.get("c").status == "rolled_back"
    assert "error" in again.report("c").last
    assert arms(again) == {"none"}


def test_figures_outlive_a_restart(tmp_path):
    rollouts = Rollouts(tmp_path / "r.json")
    rollouts.start(spec())
    feed(rollouts, 25)
    rollouts.save()
    again = Rollouts(tmp_path / "r.json")
    assert again.report("c").samples == (25, 25)
    feed(again, 5)
    assert again.get("c").stage == 1


def test_a_file_that_cannot_be_read_is_set_aside(tmp_path):
    (tmp_path / "r.json").write_text("{half")
    assert Rollouts(tmp_path / "r.json").names() == []
    assert (tmp_path / "r.json.unreadable").read_text() == "{half"


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    rollouts = Rollouts(tmp_path / "file" / "r.json")
    rollouts.start(spec())
    assert arms(rollouts) == {"old", "new"}


def test_by_hand():
    rollouts = Rollouts()
    rollouts.start(spec())
    rollouts.promote("c")
    assert arms(rollouts) == {"new"}
    rollouts.roll_back("c")
    assert arms(rollouts) == {"none"}
    rollouts.remove("c")
    with pytest.raises(RequestNotFound):
        rollouts.report("c")


def test_what_cannot_be_promoted():
    rollouts = Rollouts()
    rollouts.start(spec(mode="shadow"))
    with pytest.raises(InvalidRequest, match="is a shadow"):
        rollouts.promote("c")
    rollouts.roll_back("c")
    rollouts.start(spec(name="first"))
    rollouts.roll_back("first")
    rollouts.start(spec(name="second"))
    with pytest.raises(InvalidRequest, match="in rollout 'second'"):
        rollouts.promote("first")
    assert arms(rollouts) == {"old", "new"}
    rollouts.promote("second")
    assert rollouts.promote("second").status == "promoted"


@pytest.mark.parametrize(
    ("wrong", "param"),
    [({"variant": "old"}, "variant"), ({"name": "c"}, "name"), ({"name": "d"}, "model")],
)
def test_what_cannot_be_started(wrong, param):
    rollouts = Rollouts()
    rollouts.start(spec())
    with pytest.raises(InvalidRequest) as caught:
        rollouts.start(spec(**wrong))
    assert caught.value.param == param


def test_an_ab_test_stays_as_it_is():
    rollouts = Rollouts()
    rollouts.start(spec(mode="ab"))
    feed(rollouts, 200, new=FAILED)
    assert rollouts.get("c").status == "running"
    error = next(m for m in rollouts.report("c").metrics if m.metric == "error")
    assert error.n == (200, 200) and error.mean == (0.0, 1.0)
    assert (error.difference, error.unit) == (100.0, "points")


def test_a_shadow_answers_nobody():
    rollouts = Rollouts()
    rollouts.start(spec(mode="shadow", stages=(Stage(1.0),)))
    assert arms(rollouts) == {"none"}
    assert rollouts.shadow("old", "x") == Arm("c", "new", True)
    rollouts.roll_back("c")
    assert rollouts.shadow("old", "x") is None


def test_reports_are_json():
    rollouts = Rollouts()
    rollouts.start(spec())
    feed(rollouts, 25, new={**OK, "ttft": 4.0}, old={**OK, "ttft": 4.0})
    import msgspec

    shown = json.loads(msgspec.json.encode(rollouts.report("c")))
    assert shown["status"] == "running" and shown["share"] == 0.5
    assert shown["last"] == "25 of 30 requests answered by the arm with fewer"
    assert {m["metric"] for m in shown["metrics"]} >= {"error", "capped"}


def finished(**fields) -> RequestFinished:
    given = {"ttft_ms": 20.0, "duration_ms": 120.0, "tpot_ms": 10.0, "outcome": "stop", **fields}
    usage = Usage(prompt_tokens=5, completion_tokens=11)
    return RequestFinished(request_id="r", model_id="m", usage=usage, **given)


def test_what_an_answer_says():
    figures = measured(finished(outcome="length", empty=True))
    assert figures is not None
    assert figures["error"] == 0 and figures["capped"] == 1 and figures["empty"] == 1
    assert figures["tokens_per_s@0"] == pytest.approx(4.519, abs=1e-3)  # log of 11 tokens in 120 ms
    assert measured(finished(outcome="worker_died")) == FAILED
    assert measured(finished(outcome="cancelled")) is None
    assert measured(finished(reused="shared")) is None
    assert not any("tpot" in name for name in measured(finished(tpot_ms=None)) or {})


def test_what_a_schema_and_log_probabilities_say():
    plain = measured(finished())
    assert plain is not None and not {"broken_off", "logprob"} & set(plain)
    found = measured(finished(broken_off=True, logprob=-0.5))
    assert found is not None and (found["broken_off"], found["logprob"]) == (1.0, -0.5)
    whole = measured(finished(broken_off=False, logprob=-math.inf))
    assert whole is not None and whole["broken_off"] == 0.0 and "logprob" not in whole


def names(**fields) -> set[str]:
    return {metric.name for metric in spec(**fields).compared}


def test_what_counts():
    usual = {"error", "ttft", "tpot", "tokens_per_s", "empty", "capped", "malformed", "broken_off"}
    assert names() == names(mode="ab") == usual
    assert names(mode="shadow") == {*usual, "disagreement"}
    assert names(metrics=("logprob", "error")) == {"logprob", "error"}
    with pytest.raises(InvalidRequest) as caught:
        Rollouts().start(spec(metrics=("error", "disagreement")))
    assert caught.value.param == "metrics"


@pytest.mark.parametrize(
    ("metric", "old", "new"), [("broken_off", 0.0, 1.0), ("logprob", -0.5, -0.7)]
)
def test_a_variant_whose_answers_are_worse_is_rolled_back(metric, old, new):
    rollouts, stages = Rollouts(), (Stage(0.5, min_samples=10_000),)
    rollouts.start(spec(metrics=("error", metric), stages=stages))
    for i in range(200):
        spread = 0.1 * (i % 3 - 1) if metric == "logprob" else 0.0
        values = {**OK, metric: old + spread}, {**OK, metric: new + spread}
        feed(rollouts, 1, old=values[0], new=values[1])
    found = rollouts.get("c")
    assert found.status == "rolled_back" and found.last.startswith(f"rolled back: {metric}")


def test_what_a_judge_says_counts_where_it_is_wanted():
    rollouts, stages = Rollouts(), (Stage(0.5, min_samples=10_000),)
    rollouts.start(spec(metrics=("error", "score"), stages=stages))
    for i in range(150):
        rollouts.score("c", Score(model="old", score=0.8 + 0.1 * (i % 2)))
        rollouts.score("c", Score(model="new", score=0.6 + 0.1 * (i % 2)))
    report = rollouts.report("c")
    assert report.status == "rolled_back" and "score -20" in report.last
    assert report.samples == (0, 0)  # of requests


@pytest.mark.parametrize(
    ("metrics", "model", "param"), [(None, "new", "score"), (("score",), "other", "model")]
)
def test_a_judge_s_mistakes_are_named(metrics, model, param):
    rollouts = Rollouts()
    rollouts.start(spec(metrics=metrics))
    with pytest.raises(InvalidRequest) as caught:
        rollouts.score("c", Score(model=model, score=1.0))
    assert caught.value.param == param


def test_what_other_models_took_is_not_the_answer_s():
    company = Company(Met(others_ms=5.0, sequences=1.0), Met(others_ms=60.0, sequences=2.0))
    figures = measured(finished(company=company))
    assert figures is not None
    assert figures["ttft@0"] == pytest.approx(math.log(15.0))
    assert figures["tpot@3"] == pytest.approx(math.log(4.0))
    assert figures["tokens_per_s@2"] == pytest.approx(math.log(11 / 0.055))
    more = measured(finished(company=Company(Met(30.0, 1.0), Met(0.0, 1.0))))
    assert more is not None and more["ttft@0"] == pytest.approx(math.log(0.2))


def test_figures_of_earlier_versions_are_read(tmp_path):
    """Without strata of company: as one of their own."""
    rollouts = Rollouts(tmp_path / "r.json")
    rollouts.start(spec())
    feed(rollouts, 25, old={**OK, "tpot": 2.0}, new={**OK, "tpot": 2.0})
    rollouts.save()
    again = Rollouts(tmp_path / "r.json")
    feed(again, 3, old={**OK, "tpot@0": 2.0}, new={**OK, "tpot@0": 2.0})
    found = next(m for m in again.report("c").metrics if m.metric == "tpot")
    assert found.n == (28, 28)
