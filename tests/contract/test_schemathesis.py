"""schemathesis reads /openapi.json and sends what it makes of it, right and wrong, to a real server:
no 5xx, no hang, no answer that breaks its own schema."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from contract.served import serving


def no_fault_of_ours(ctx: Any, response: Any, case: Case) -> bool | None:
    """A deadline that the client set itself and that cannot be kept is told as a 504."""
    if response.status_code == 504 and isinstance(case.body, dict) and case.body.get("timeout"):
        return None
    return not_a_server_error(ctx, response, case)


CHECKS: Any = [
    no_fault_of_ours,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
HANG_S = 60
"""A request that takes longer fails."""


@pytest.fixture(scope="module")
def url(scripted_once: Any) -> Iterator[str]:
    model = scripted_once("hash", mode="hash", context=256)
    with serving([model], "--model-aliases", "*") as url:
        yield url


USER = [{"role": "user", "content": "Hi"}]
RIGHT: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": USER},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/responses": {"input": "Hi"},
    "/v1/messages": {"messages": USER, "max_tokens": 9},
    "/v1/messages/count_tokens": {"messages": USER},
    "/api/chat": {"messages": USER},
    "/api/generate": {"prompt": "Hi"},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [72]},
}
"""Bodies that are answered: with a few fields of schemathesis's making they often still are."""


def send(url: str, data: st.DataObject, mode: GenerationMode) -> Case:
    """One case of an endpoint of its choice."""
    schema = load(url)
    operations = sorted((found.ok() for found in schema.get_all_operations()), key=_label)
    operation = data.draw(st.sampled_from(operations))
    case: Case = data.draw(operation.as_strategy(generation_mode=mode))
    right = RIGHT.get(operation.path)
    if right is not None and isinstance(case.body, dict) and data.draw(st.booleans()):
        some = (
            st.lists(st.sampled_from(sorted(case.body)), max_size=2) if case.body else st.just([])
        )
        case.body = right | {name: case.body[name] for name in data.draw(some)}
    case.call_and_validate(base_url=url, checks=CHECKS, timeout=HANG_S)
    return case


def _label(operation: Any) -> str:
    return str(operation.label)


_loaded: dict[str, Any] = {}


def load(url: str) -> Any:
    if url not in _loaded:
        _loaded[url] = schemathesis.openapi.from_dict(httpx.get(url + "/openapi.json").json())
    return _loaded[url]


def run(url: str, cases: int, mode: GenerationMode) -> None:
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        derandomize=True,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data())
    def test(data: st.DataObject) -> None:
        send(url, data, mode)

    test()


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda m: m.value)
def test_a_hundred_cases(url: str, mode: GenerationMode) -> None:
    run(url, 50, mode)
    assert httpx.get(url + "/health").json()["open_requests"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda m: m.value)
def test_thousands_of_cases(url: str, mode: GenerationMode) -> None:
    run(url, 3000, mode)
    assert httpx.get(url + "/health").json()["open_requests"] == 0
