"""The requests of agents, field for field as their programs send them, with texts of our own; and
that their order of roles suits templates that know a system message at the beginning only."""

from __future__ import annotations

from typing import Any

import httpx

from mlx_serving.content.template import ChatTemplate
from mlx_serving.errors import Overloaded, RateLimited, WorkerDied

STRICT = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('System message must be at the beginning.') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}"
)
EPHEMERAL = {"type": "ephemeral"}
SHELL: dict[str, Any] = {"type": "object", "properties": {"command": {"type": "string"}}}
CLAUDE_CODE: dict[str, Any] = {
    "model": "claude-opus-4-8",
    "max_tokens": 64000,
    "stream": True,
    "system": [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1; cch=1;"},
        {"type": "text", "text": "a", "cache_control": EPHEMERAL},
        {"type": "text", "text": "b", "cache_control": EPHEMERAL},
    ],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "c"}, {"type": "text", "text": "d"}]},
        {"role": "system", "content": "e"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "f", "signature": "mlx-serving"},
                {"type": "text", "text": "g"},
                {"type": "tool_use", "id": "t1", "name": "Bash", "input": {"command": "ls"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "t1",
                    "content": "h",
                    "is_error": False,
                    "cache_control": EPHEMERAL,
                }
            ],
        },
    ],
    "tools": [{"name": "Bash", "description": "Runs it.", "input_schema": SHELL}],
    "metadata": {"user_id": "{}"},
    "thinking": {"type": "adaptive"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "output_config": {"effort": "high"},
}


async def test_claude_codes_requests(client: httpx.AsyncClient, gateway: Any) -> None:
    headers = {
        "authorization": "Bearer x",
        "anthropic-version": "2023-06-01",
        "anthropic-beta": "claude-code-20250219,mid-conversation-system-2026-04-07",
        "x-app": "cli",
    }
    assert (await client.head("/")).status_code == 200, "it asks whether anybody is there"
    first = CLAUDE_CODE | {"messages": CLAUDE_CODE["messages"][:2]}
    shown = []
    for body in (first, CLAUDE_CODE):
        answer = await client.post("/v1/messages?beta=true", json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        assert "x-mlx-serving-ignored" not in answer.headers
        prompt = gateway.requests[-1].prompt
        assert [tool["function"]["name"] for tool in prompt.tools] == ["Bash"]
        shown.append(ChatTemplate({"default": STRICT}).render(prompt))
    assert shown == ["<system>a\nb<user>c\nd<user>e", shown[0] + "<assistant>g<tool>h"]


CODEX: dict[str, Any] = {
    "model": "tiny",
    "instructions": "You are an agent.",
    "input": [
        {
            "type": "message",
            "id": "m1",
            "role": "developer",
            "content": [{"type": "input_text", "text": "a"}],
        },
        {
            "type": "message",
            "id": "m2",
            "role": "user",
            "content": [{"type": "input_text", "text": "b"}],
        },
        {
            "type": "reasoning",
            "id": "r1",
            "summary": [],
            "content": None,
            "encrypted_content": None,
        },
        {
            "type": "reasoning",
            "id": "r2",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "e"}],
            "encrypted_content": None,
        },
        {
            "type": "message",
            "role": "assistant",
            "phase": "commentary",
            "id": "m3",
            "status": "completed",
            "content": [{"type": "output_text", "text": "c", "annotations": [], "logprobs": []}],
        },
        {"type": "function_call", "name": "shell", "arguments": "{}", "call_id": "c1"},
        {"type": "function_call_output", "call_id": "c1", "output": "d"},
    ],
    "tools": [
        {
            "type": "function",
            "name": "shell",
            "description": "Runs it.",
            "strict": False,
            "parameters": {"type": "object", "properties": {"command": {"type": "string"}}},
        }
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "reasoning": {"summary": "auto"},
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "k",
    "client_metadata": {"x-codex-installation-id": "i"},
}


async def test_codexs_requests(
    client: httpx.AsyncClient, relaxed: httpx.AsyncClient, gateway: Any
) -> None:
    assert (await client.post("/v1/responses", json=CODEX)).status_code == 200
    searching = {"type": "web_search", "external_web_access": False}
    agents = {
        "type": "namespace",
        "name": "multi_agent_v1",
        "description": "Agents.",
        "tools": [{**CODEX["tools"][0], "name": "spawn_agent"}],
    }
    default = CODEX | {"tools": [searching, *CODEX["tools"], agents]}
    for sent in (default, default | {"input": [*CODEX["input"], *SPAWNED]}):
        answered = await client.post("/v1/responses", json=sent)
        assert answered.status_code == 200, answered.text
        assert "tools[0]" in answered.headers["x-mlx-serving-advisory"]
        shown = [t["function"]["name"] for t in gateway.requests[-1].prompt.tools]
        assert shown == ["shell", "multi_agent_v1__spawn_agent"]
    hosted = CODEX | {"tools": [{"type": "image_generation"}, *CODEX["tools"]]}
    refused = await client.post("/v1/responses", json=hosted)
    assert refused.json()["error"]["param"] == "tools[0].type"
    answered = await relaxed.post("/v1/responses", json=hosted)
    assert answered.headers["x-mlx-serving-ignored"] == "tools[0]"


SPAWNED: list[dict[str, Any]] = [
    {
        "type": "function_call",
        "name": "spawn_agent",
        "namespace": "multi_agent_v1",
        "arguments": "{}",
        "call_id": "c2",
    },
    {"type": "function_call_output", "call_id": "c2", "output": "d"},
]


async def test_what_cannot_help_is_not_tried_again(client: httpx.AsyncClient, gateway: Any) -> None:
    asked = {"model": "claude-x", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]}
    refused = await client.post("/v1/messages", json=asked | {"max_tokens": 0})
    assert (refused.status_code, refused.headers["x-should-retry"]) == (400, "false")
    for error in (RateLimited("later"), Overloaded("later", retry_after_s=1.0), WorkerDied("died")):
        gateway.refuse = lambda _, error=error: error
        answer = await client.post("/v1/messages", json=asked)
        assert answer.status_code == error.status and "x-should-retry" not in answer.headers
