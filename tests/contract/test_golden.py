"""Golden streams, event by event, of every dialect: real processes, scripted models.

A slow reader's events are merged, so how a text is cut is nobody's promise: neighbouring pieces of
one text are joined before they are compared. MLX_SERVING_TEST_GOLDEN=write writes the files anew.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from contract.served import serving

GOLDEN = Path(__file__).with_name("golden")
AGENT = (
    "<think>Hmm… 🤔</think>Ich addiere.\n"
    '<tool_call>\n{"name": "add", "arguments": {"x": 1, "wo": "Köln"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)
TEMPLATE = "{{ tools }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{# <tool_call> <think> </think> #}"
USER = [{"role": "user", "content": "Hi"}]
SCHEMA = {"type": "object"}
NAMES = ("add", "now")
FUNCTIONS = [{"name": name, "parameters": SCHEMA} for name in NAMES]
TOOLS = [{"type": "function", "function": function} for function in FUNCTIONS]

BODIES: dict[str, dict[str, dict[str, Any]]] = {
    "/v1/chat/completions": {
        "agent": {"messages": USER, "tools": TOOLS, "stream_options": {"include_usage": True}},
        "stopped": {"messages": USER, "stop": "STOP"},
        "cut": {"messages": USER, "max_tokens": 4},
    },
    "/v1/completions": {
        "stopped": {"prompt": "Hi", "stop": "STOP", "n": 1},
        "cut": {"prompt": "Hi", "max_tokens": 4, "stream_options": {"include_usage": True}},
    },
    "/v1/responses": {
        "agent": {"input": "Hi", "tools": [{"type": "function"} | f for f in FUNCTIONS]},
        "cut": {"input": "Hi", "max_output_tokens": 4},
    },
    "/v1/messages": {
        "agent": {
            "messages": USER,
            "max_tokens": 999,
            "tools": [{"name": name, "input_schema": SCHEMA} for name in NAMES],
        },
        "stopped": {"messages": USER, "max_tokens": 999, "stop_sequences": ["STOP"]},
        "cut": {"messages": USER, "max_tokens": 4},
    },
    "/api/chat": {
        "agent": {"messages": USER, "tools": TOOLS},
        "stopped": {"messages": USER, "options": {"stop": "STOP"}},
        "cut": {"messages": USER, "options": {"num_predict": 4}},
    },
    "/api/generate": {
        "agent": {"prompt": "Hi"},
        "cut": {"prompt": "Hi", "options": {"num_predict": 4}},
    },
}

Event = tuple[str, Any]
"""An event's name, "" where the dialect has none, and its data."""


@pytest.fixture(scope="module")
def url(scripted_once: Any) -> Iterator[str]:
    models = [
        scripted_once("agent", text=AGENT, context=4096, chat_template=TEMPLATE),
        scripted_once("stopped", text="Grüße, STOPP."),
        scripted_once("cut", text="Grüße"),
    ]
    with serving(models, "--prefix-cache-bytes", "0") as url:
        yield url


@pytest.mark.parametrize("path", BODIES)
def test_golden(url: str, path: str) -> None:
    found = ""
    for model, body in BODIES[path].items():
        response = httpx.post(url + path, json=body | {"model": model, "stream": True}, timeout=120)
        assert response.status_code == 200, response.text
        events = [piece for event in read(response.text) for piece in parted(event)]
        lines = [f"{name} {data}".strip() for name, data in shown(joined(events))]
        found += "\n".join([f"== {model}", *lines, "", ""])
    file = GOLDEN / (path.strip("/").replace("/", "_") + ".txt")
    if os.environ.get("MLX_SERVING_TEST_GOLDEN") == "write":
        file.write_text(found)
    assert found == file.read_text()


def read(text: str) -> list[Event]:
    """Server-sent events, or lines of JSON."""
    if text.startswith("{"):
        return [("", json.loads(line)) for line in text.splitlines()]
    events: list[Event] = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        data = fields["data"]
        events.append((fields.get("event", ""), data if data == "[DONE]" else json.loads(data)))
    return events


def parted(event: Event) -> list[Event]:
    """OpenAI's chunks may carry several kinds of news, and Ollama's lines several calls; here each has
    an event of its own."""
    name, data = event
    if isinstance(data, dict) and (calls := data.get("message", {}).get("tool_calls")):
        return [(name, data | {"message": data["message"] | {"tool_calls": [c]}}) for c in calls]
    if not (isinstance(data, dict) and data.get("choices")):
        return [event]
    (choice,) = data["choices"]
    ends = choice["finish_reason"] is not None
    if "text" in choice:
        news: list[dict[str, Any]] = (
            [{"text": choice["text"]}] if choice["text"] or not ends else []
        )
        end: dict[str, Any] = {"text": ""}
    else:
        news = [{"delta": delta} for delta in _deltas(choice["delta"])]
        end = {"delta": {}}
    pieces = [choice | one | {"finish_reason": None} for one in news]
    for piece in pieces:
        piece.pop("stop_reason", None)
    if ends:
        pieces.append(choice | end)
    return [(name, data | {"choices": [piece]}) for piece in pieces]


def _deltas(delta: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if "role" in delta:
        yield delta
        return
    for kind in ("reasoning_content", "content"):
        if delta.get(kind):
            yield {kind: delta[kind]}
    for call in delta.get("tool_calls", ()):
        arguments = call["function"].get("arguments", "")
        if "id" in call:
            yield {"tool_calls": [call | {"function": call["function"] | {"arguments": ""}}]}
        if arguments:
            rest = {"index": call["index"], "function": {"arguments": arguments}}
            yield {"tool_calls": [rest]}


GROWING = {"content", "reasoning_content", "text", "thinking", "partial_json", "arguments", "delta", "response"}  # fmt: skip
COUNTED = {"sequence_number", "created", "created_at"}


def joined(events: list[Event]) -> list[Event]:
    """Neighbours that are alike but for one growing text become one."""
    found: list[Event] = []
    for name, data in events:
        if found and found[-1][0] == name and (both := _join(found[-1][1], data)) is not None:
            found[-1] = name, both
        else:
            found.append((name, data))
    return found


def _join(a: Any, b: Any) -> Any | None:
    """`a` with what grew in `b`; None: they differ in something else."""
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b) == 1:
        inner = _join(a[0], b[0])
        return None if inner is None else [inner]
    if not (isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys()):
        return None
    differing = [key for key in a if a[key] != b[key] and key not in COUNTED]
    # Two pieces may be equal, too: then the growing text is the one that both have.
    places = differing or [k for k in a if k in GROWING and isinstance(a[k], str)]
    grown = [key for key in places if key in GROWING and isinstance(a[key], str)]
    if grown and grown == places:
        (key,) = grown
        return a | {key: a[key] + b[key]}
    nested = places or [key for key in a if isinstance(a[key], dict | list) and a[key]]
    if len(nested) != 1:
        return None
    inner = _join(a[nested[0]], b[nested[0]])
    return None if inner is None else a | {nested[0]: inner}


MASKS = (
    (r"\b(chatcmpl|cmpl|msg|call|resp|rs|fc)_?-?[0-9a-f]{24,48}", r"\1-ID"),
    (r'"(created|created_at|completed_at)": (\d+|"[^"]*")', r'"\1": 0'),
    (r'"(\w+_duration)": \d+', r'"\1": 0'),
    (r'"system_fingerprint": "[^"]*"', '"system_fingerprint": "F"'),
)


def shown(events: list[Event]) -> Iterator[tuple[str, str]]:
    for number, (name, data) in enumerate(events):
        if isinstance(data, dict) and "sequence_number" in data:
            data["sequence_number"] = number
        text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
        for pattern, masked in MASKS:
            text = re.sub(pattern, masked, text)
        yield name, text


def test_joining() -> None:
    """The rule that the files stand on."""

    def chunk(**delta: Any) -> Event:
        return "", {"choices": [{"index": 0, "delta": delta, "finish_reason": None}], "created": 1}

    assert joined([chunk(content="a"), chunk(content="b")]) == [chunk(content="ab")]
    assert joined([chunk(content="a"), chunk(content="a")]) == [chunk(content="aa")]
    apart = [chunk(content="a"), chunk(reasoning_content="b")]
    assert joined(apart) == apart
    both = "", {"choices": [{"index": 0, "delta": {"reasoning_content": "b", "content": "a"}, "finish_reason": "stop"}]}  # fmt: skip
    assert [list(p[1]["choices"][0]["delta"]) for p in parted(both)] == [
        ["reasoning_content"],
        ["content"],
        [],
    ]
