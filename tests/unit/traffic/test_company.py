from __future__ import annotations

import pytest

from mlx_serving.telemetry.events import Company, Met
from mlx_serving.traffic.company import Companies
from mlx_serving.worker.wire import StepStats


def step(companies: Companies, model: str, running: int, own_ms: float = 10.0, rows: int = 0):
    stats = StepStats(model_id=model, running=running, decode_rows=rows, own_ms=own_ms)
    companies.observe(stats)


def test_a_request_meets_sequences_of_its_model_and_steps_of_others():
    companies = Companies()
    step(companies, "a", 9)
    step(companies, "b", 9)
    meeting = companies.meet("a")
    step(companies, "a", 1)
    step(companies, "a", 3)
    step(companies, "b", 5, 7.0)
    meeting.answered()
    step(companies, "a", 4)
    step(companies, "b", 2, 1.0)
    step(companies, "c", 2, 2.0)
    assert meeting.company() == Company(Met(7.0, 2.0), Met(pytest.approx(3.0), 4.0))


def test_who_waits_for_a_row_with_it_is_company_up_to_the_first_token():
    companies = Companies()
    meeting = companies.meet("a")
    companies.observe(StepStats(model_id="a", running=2, waiting=3, own_ms=1.0))
    companies.observe(StepStats(model_id="a", running=3, waiting=2, own_ms=1.0))
    meeting.answered()
    companies.observe(StepStats(model_id="a", running=3, waiting=4, own_ms=1.0))
    assert meeting.company() == Company(Met(0.0, 5.0), Met(0.0, 3.0))


def test_those_that_a_step_ended_shared_it():
    companies = Companies()
    meeting = companies.meet("a")
    step(companies, "a", 0, rows=3)
    meeting.answered()
    step(companies, "a", 0, rows=0)
    assert meeting.company() == Company(Met(0.0, 3.0), Met(0.0, 1.0))


def test_without_a_token_there_is_nothing_to_say():
    assert Companies().meet("a").company() is None


def test_without_a_step_it_was_alone():
    meeting = Companies().meet("a")
    meeting.answered()
    assert meeting.company() == Company(Met(0.0, 1.0), Met(0.0, 1.0))
