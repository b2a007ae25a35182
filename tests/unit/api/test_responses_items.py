"""Items of /v1/responses, and the messages that they become."""

from __future__ import annotations

from typing import Any

import httpx

from mlx_serving.types import ChatPrompt, Message


async def prompt_of(client: httpx.AsyncClient, gateway: Any, **body: Any) -> ChatPrompt:
    response = await client.post("/v1/responses", json={"input": "Hi", **body})
    assert response.status_code == 200, response.text
    prompt = gateway.requests[-1].prompt
    assert isinstance(prompt, ChatPrompt)
    return prompt


async def test_items_become_what_the_template_sees(client: httpx.AsyncClient, gateway: Any) -> None:
    prompt = await prompt_of(
        client,
        gateway,
        instructions="One.",
        input=[
            {"role": "system", "content": "Two."},
            {"role": "developer", "content": [{"type": "input_text", "text": "Three."}]},
            {"role": "user", "content": "Add.", "type": "message"},
            {
                "type": "reasoning",
                "id": "rs_1",
                "summary": [],
                "content": [{"type": "reasoning_text", "text": "Hm."}],
            },
            {"role": "assistant", "content": [{"type": "output_text", "text": "Adding."}]},
            {"type": "function_call", "call_id": "c1", "name": "add", "arguments": "{}"},
            {"type": "function_call", "call_id": "c2", "name": "now", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "3"},
            {
                "type": "function_call_output",
                "call_id": "c2",
                "output": [{"type": "input_text", "text": "4"}],
            },
            {"role": "developer", "content": "Later."},
        ],
    )

    def call(call_id: str, name: str) -> dict[str, Any]:
        return {"id": call_id, "type": "function", "function": {"name": name, "arguments": "{}"}}

    assert prompt.messages == (
        Message(role="system", content="One.\n\nTwo.\n\nThree."),
        Message(role="user", content="Add."),
        Message(
            role="assistant",
            content="Adding.",
            reasoning_content="Hm.",
            tool_calls=(call("c1", "add"), call("c2", "now")),
        ),
        Message(role="tool", content="3", tool_call_id="c1"),
        Message(role="tool", content="4", tool_call_id="c2"),
        Message(role="system", content="Later."),
    )
