"""The conversation, its commands, and the server at its other end."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from typing import Any

import httpx
import pytest

from mlx_serving.cli.chat import Chat
from mlx_serving.cli.talkers import Emit, Message, ServerTalker
from mlx_serving.cli.where import where
from mlx_serving.errors import (
    InvalidRequest,
    MLXServingError,
    ModelNotFound,
    Overloaded,
    ServerError,
    Unauthorized,
)


class Echo:
    """Answers with how many messages it was given; breaks where it is told to."""

    name = "echo"

    def __init__(self) -> None:
        self.asked: list[tuple[list[Message], dict[str, Any]]] = []
        self.thoughts: tuple[str, ...] = ()
        self.breaks: BaseException | None = None

    def answer(
        self, messages: list[Message], params: Mapping[str, Any], emit: Emit, think: Emit
    ) -> None:
        self.asked.append(([dict(m) for m in messages], dict(params)))
        for thought in self.thoughts:
            think(thought)
        if self.thoughts and self.breaks is not None:
            raise self.breaks
        emit(str(len(messages)))
        if self.breaks is not None:
            raise self.breaks
        emit("!")

    def close(self) -> None: ...


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def chatting(out: io.StringIO | None = None, **kwargs: Any) -> tuple[Chat, Echo, io.StringIO]:
    out, echo = out or io.StringIO(), Echo()
    return Chat(echo, out, **{"system": None, "params": {}, **kwargs}), echo, out


def test_history_grows_and_is_forgotten() -> None:
    chat, echo, out = chatting(system="be brief")
    assert chat.line("one")
    assert chat.line("two")
    assert echo.asked[1][0] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "2!"},
        {"role": "user", "content": "two"},
    ]
    assert out.getvalue() == "2!\n4!\n"
    assert chat.line("/reset")
    assert chat.messages == [{"role": "system", "content": "be brief"}]
    assert chat.line("/system be long")
    assert chat.messages == [{"role": "system", "content": "be long"}]
    assert chat.line("/system")
    assert chat.messages == []


def test_leaving() -> None:
    chat, _, _ = chatting()
    assert not chat.line("/exit")
    assert not chat.line(" /quit ")
    assert chat.line("")


def test_parameters() -> None:
    chat, echo, out = chatting(params={"seed": 1})
    for line in ("/set temperature 0.5", "/set max_tokens 3", "/set seed", "/set top_p x", "/set"):
        assert chat.line(line)
    chat.line("hello")
    assert echo.asked[0][1] == {"temperature": 0.5, "max_tokens": 3}
    assert "'x' is not a number" in out.getvalue()
    assert "temperature = 0.5, max_tokens = 3" in out.getvalue()


def test_an_unknown_command_is_no_question() -> None:
    chat, echo, out = chatting()
    chat.line("/help")
    chat.line("/frobnicate")
    assert echo.asked == []
    assert "/system TEXT" in out.getvalue()
    assert "unknown command /frobnicate" in out.getvalue()


def test_an_interrupt_stops_the_answer_and_keeps_what_came() -> None:
    chat, echo, out = chatting()
    echo.breaks = KeyboardInterrupt()
    assert chat.line("hello")
    assert chat.messages[-1] == {"role": "assistant", "content": "1"}
    assert "[stopped]" in out.getvalue()


def test_an_error_takes_the_question_back() -> None:
    chat, echo, out = chatting()
    echo.breaks = Overloaded("try later")
    assert not chat.ask("hello")
    assert chat.messages == []
    assert "error: try later" in out.getvalue()


def test_what_the_model_thinks_is_dimmed_on_a_terminal_and_not_said_again() -> None:
    chat, echo, out = chatting(Terminal())
    echo.thoughts = ("Hm", ", well.")
    chat.line("hello")
    assert out.getvalue() == "\x1b[2mHm, well.\x1b[0m\n\n1!\n"
    assert chat.messages[-1] == {"role": "assistant", "content": "1!"}


def test_a_pipe_gets_the_answer_alone() -> None:
    chat, echo, out = chatting()
    echo.thoughts = ("Hm",)
    assert chat.ask("hello")
    assert out.getvalue() == "1!\n"


@pytest.mark.parametrize("breaks", [KeyboardInterrupt(), Overloaded("try later")])
def test_the_terminal_is_not_left_dimmed(breaks: BaseException) -> None:
    chat, echo, out = chatting(Terminal())
    echo.thoughts, echo.breaks = ("Hm",), breaks
    chat.line("hello")
    assert out.getvalue().startswith("\x1b[2mHm\x1b[0m")


Handler = Callable[[httpx.Request], httpx.Response]


def served(chat_completions: Handler) -> tuple[ServerTalker, list[dict[str, Any]]]:
    bodies: list[dict[str, Any]] = []

    def handle(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "m"}, {"id": "n"}]})
        bodies.append(json.loads(request.content))
        return chat_completions(request)

    return ServerTalker(where("http://x/v1/"), None, httpx.MockTransport(handle)), bodies


def sse(*events: object) -> httpx.Response:
    lines = "".join(f"data: {e if isinstance(e, str) else json.dumps(e)}\n\n" for e in events)
    return httpx.Response(200, text=": ping\n\n" + lines)


def delta(**fields: Any) -> dict[str, Any]:
    return {"choices": [{"delta": fields}]}


def answer(talker: ServerTalker) -> str:
    """Thoughts in brackets."""
    parts: list[str] = []
    question = [{"role": "user", "content": "hi"}]
    talker.answer(question, {"seed": 1}, parts.append, lambda thought: parts.append(f"({thought})"))
    return "".join(parts)


def test_a_server_streams() -> None:
    thought, said = delta(reasoning_content="Hm."), [delta(content="Pa"), delta(content="ris")]
    events = [delta(role="assistant"), thought, *said, {"choices": []}]
    talker, bodies = served(lambda _: sse(*events, "[DONE]", "never read"))
    assert talker.name == "m at http://x"
    assert answer(talker) == "(Hm.)Paris"
    assert bodies == [
        {
            "model": "m",
            "messages": [{"role": "user", "content": "hi"}],
            "stream": True,
            "seed": 1,
        }
    ]
    talker.close()


def refuse(request: httpx.Request) -> httpx.Response:
    error = {"message": "no", "code": "invalid_value", "param": "seed", "type": "x"}
    return httpx.Response(400, json={"error": error})


def drop(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("refused", request=request)


@pytest.mark.parametrize(
    ("handler", "error", "message"),
    [
        (refuse, InvalidRequest, "no"),
        (drop, ServerError, "http://x: refused"),
        (lambda _: httpx.Response(502, text="<html>"), ServerError, "did not answer in JSON"),
        (lambda _: httpx.Response(500, json={"detail": "x"}), ServerError, "the server answered"),
        (
            lambda _: sse({"error": {"message": "gone", "code": "model_not_found"}}),
            ModelNotFound,
            "gone",
        ),
    ],
)
def test_a_server_refuses(handler: Handler, error: type[MLXServingError], message: str) -> None:
    talker, _ = served(handler)
    with pytest.raises(error, match=message):
        answer(talker)


@pytest.mark.parametrize(
    "models",
    [
        lambda _: httpx.Response(200, json={"data": []}),
        lambda _: httpx.Response(404, json={}),
        drop,
    ],
)
def test_a_server_without_models(models: Handler) -> None:
    with pytest.raises(ServerError):
        ServerTalker(where("http://x"), None, httpx.MockTransport(models))


def test_a_server_that_asks_for_a_key() -> None:
    def handle(request: httpx.Request) -> httpx.Response:
        if request.headers.get("authorization") != "Bearer secret":
            return httpx.Response(401, json={"error": {"code": "missing_api_key", "message": ""}})
        return httpx.Response(200, json={"data": [{"id": "m"}]})

    with pytest.raises(Unauthorized, match="--api-key"):
        ServerTalker(where("http://x"), None, httpx.MockTransport(handle))
    assert (
        ServerTalker(where("http://x"), None, httpx.MockTransport(handle), "secret").name
        == "m at http://x"
    )
