"""`mlx-serving chat`: a conversation with a running server, or with an engine started here.

On a terminal it is a loop with history; with text piped in, that text is asked once.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TextIO

from mlx_serving.cli.exits import Exit, failed
from mlx_serving.cli.say import Say
from mlx_serving.cli.talkers import EngineTalker, Message, ServerTalker, Talker, answers
from mlx_serving.cli.where import Where
from mlx_serving.errors import MLXServingError

HELP = """\
/reset            forget the conversation
/system TEXT      set the system message (and forget the conversation); no TEXT: none
/set NAME VALUE   set temperature, top_p, max_tokens, seed, ...; no VALUE: back to the default
/help             this text
/exit             leave (also Ctrl-D); Ctrl-C stops an answer"""


DIM, PLAIN = "\x1b[2m", "\x1b[0m"


class Chat:
    """The conversation and its commands, apart from where lines come from and go to."""

    def __init__(
        self, talker: Talker, out: TextIO, system: str | None, params: Mapping[str, Any]
    ) -> None:
        self._talker = talker
        self._out = out
        self._params = dict(params)
        self._system = system
        self.messages: list[Message] = []
        self._reset()

    def line(self, text: str) -> bool:
        """Obey a command or ask a question; False ends the conversation."""
        command, _, rest = text.strip().partition(" ")
        match command:
            case "":
                pass
            case "/exit" | "/quit":
                return False
            case "/help":
                self._print(HELP)
            case "/reset":
                self._reset()
            case "/system":
                self._system = rest.strip() or None
                self._reset()
            case "/set":
                self._set(*rest.partition(" ")[::2])
            case _ if command.startswith("/"):
                self._print(f"unknown command {command}; /help lists them")
            case _:
                self.ask(text)
        return True

    def ask(self, text: str) -> bool:
        """Stream the answer; Ctrl-C keeps what came so far. False if it failed."""
        self.messages.append({"role": "user", "content": text})
        shown = _Shown(self._out)
        try:
            self._talker.answer(self.messages, self._params, shown.say, shown.think)
        except KeyboardInterrupt:
            self._print(f"{shown.end()} [stopped]")
        except MLXServingError as error:
            self.messages.pop()
            self._print(f"{shown.end()}error: {error.message}")
            return False
        else:
            self._print(shown.end())
        self.messages.append({"role": "assistant", "content": "".join(shown.said)})
        return True

    def _reset(self) -> None:
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def _set(self, name: str, value: str) -> None:
        if not name:
            self._print(
                ", ".join(f"{k} = {v}" for k, v in self._params.items()) or "nothing is set"
            )
        elif not value:
            self._params.pop(name, None)
        else:
            try:
                self._params[name] = float(value) if "." in value else int(value)
            except ValueError:
                self._print(f"'{value}' is not a number")

    def _print(self, text: str) -> None:
        print(text, file=self._out, flush=True)


class _Shown:
    """One answer as it comes. What the model thinks is dimmed, and for terminals only: a pipe gets the
    answer alone.

    Attributes:
        said: the pieces of the answer.
    """

    def __init__(self, out: TextIO) -> None:
        self.said: list[str] = []
        self._out = out
        self._dimmed = False

    def think(self, piece: str) -> None:
        if self._out.isatty():
            self._write(piece if self._dimmed else f"{DIM}{piece}")
            self._dimmed = True

    def say(self, piece: str) -> None:
        self.said.append(piece)
        self._write(self.end("\n\n") + piece)

    def end(self, gap: str = "") -> str:
        """What ends the dimmed part, if the terminal is in one, and then `gap`."""
        dimmed, self._dimmed = self._dimmed, False
        return f"{PLAIN}{gap}" if dimmed else ""

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


def run(
    model: str | None,
    *,
    server: Where,
    named: bool,
    system: str | None,
    params: Mapping[str, Any],
    api_key: str | None = None,
) -> int:
    """`named`: the server was asked for; otherwise an engine is started where none answers."""
    say = Say()
    try:
        talker = _talker(model, server, named, say, api_key)
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except MLXServingError as error:
        return failed(error, say, Exit.FAILED if named else Exit.NO_MODEL)
    try:
        chat = Chat(talker, sys.stdout, system, params)
        if not sys.stdin.isatty():
            text = sys.stdin.read().strip()
            return Exit.OK if not text or chat.ask(text) else Exit.FAILED
        say.event("chat", f"talking to {talker.name}; /help lists commands, /exit leaves")
        _loop(chat)
        return Exit.OK
    finally:
        talker.close()


def _loop(chat: Chat) -> None:
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives input() editing and history
    while True:
        try:
            if not chat.line(input("> ")):
                return
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(/exit leaves)")


def _talker(model: str | None, server: Where, named: bool, say: Say, api_key: str | None) -> Talker:
    if named or (model is None and answers(server)):
        return ServerTalker(server, model, api_key=api_key)
    say.event("starting", f"starting an engine with {model or 'the default model'} ...")
    return EngineTalker(model, say)
