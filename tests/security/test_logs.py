"""Keys, prompts and answers are in no log, whatever its level, and in no error of the server's."""

from __future__ import annotations

import json
from typing import Any

import psutil
import pytest

PROMPT = "zebra-crossing"
ANSWER = "An answer with"
TOOL = {"type": "function", "function": {"name": "zebra_crossing", "parameters": {}}}


def talk(server: Any) -> None:
    """Requests that succeed, fail and are refused, in every dialect."""
    message = {"role": "user", "content": PROMPT}
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", {"messages": [message], "max_tokens": 8}),
        ("/v1/chat/completions", {"messages": [message], "max_tokens": 8, "stream": True}),
        ("/v1/chat/completions", {"messages": [message], "max_tokens": 8, "tools": [TOOL]}),
        ("/v1/chat/completions", {"messages": [message], "temperature": 9}),
        ("/v1/chat/completions", {"messages": [message], "model": PROMPT}),
        ("/v1/chat/completions", {"messages": [message | {"role": PROMPT}]}),
        ("/v1/completions", {"prompt": PROMPT, "max_tokens": 8, "echo": True}),
        ("/v1/completions", {"prompt": PROMPT * 1000}),
        ("/v1/responses", {"input": PROMPT, "max_output_tokens": 8}),
        ("/v1/messages", {"messages": [message], "max_tokens": 8}),
        ("/api/chat", {"messages": [message], "model": "scripted"}),
        ("/tokenize", {"prompt": PROMPT}),
    ]
    for key in (server.key, server.admin, server.key + "-wrong", None):
        with server.client(key) as client:
            for route, body in bodies:
                client.post(route, json=body)
            client.post("/v1/completions", content=json.dumps(PROMPT).encode())
            client.get("/metrics")
            client.get("/health")


def test_logs_hold_no_secrets_and_no_prompts(server: Any) -> None:
    talk(server)
    logged = server.logged()
    assert "POST '/v1/messages' -> 200" in logged, "there is something to look at"
    for secret in (server.key, server.admin, PROMPT, "zebra_crossing", ANSWER):
        assert secret not in logged


def test_a_fault_of_ours_says_nothing_of_the_request(server: Any) -> None:
    """Metrics and health have names of models, not of what was asked."""
    talk(server)
    with server.client(server.admin) as client:
        for path in ("/metrics", "/health", "/v1/models", "/openapi.json"):
            text = client.get(path).text
            assert not any(s in text for s in (server.key, server.admin, PROMPT, ANSWER)), path


def test_a_worker_knows_no_keys(server: Any) -> None:
    (worker,) = psutil.Process(server.process.pid).children()
    told = worker.environ()
    assert "PATH" in told, "there is something to look at"
    assert not {server.key, server.admin} & set(told.values())


def test_settings_are_shown_without_their_secrets(server: Any) -> None:
    from mlx_serving.config_sources import load

    config = load({"api_key": [server.key], "admin_key": server.admin}, env={})
    assert server.key not in repr(config) and server.admin not in repr(config)


CHAT = {"messages": [{"role": "user", "content": "x"}]}
HUGE = "z" * 1_000_000


@pytest.mark.parametrize(
    ("route", "right"), [("/v1/chat/completions", CHAT), ("/v1/completions", {"prompt": "x"})]
)
@pytest.mark.parametrize(
    "wrong", [{"model": HUGE}, {HUGE: 1}, {"stop": [HUGE]}, {"priority": HUGE}, {"seed": HUGE}]
)
def test_an_error_repeats_little(server: Any, route: str, right: Any, wrong: Any) -> None:
    """What a client sent is quoted in part at most: an answer is no amplifier."""
    with server.client() as client:
        answer = client.post(route, json=right | wrong)
    assert 400 <= answer.status_code < 500
    assert len(answer.content) < 2000
