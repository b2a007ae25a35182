"""The text side of one model: prompts to token ids, token streams to text."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_serving.content.control import ControlGuard
from mlx_serving.content.detokenize import open_detokenizer
from mlx_serving.content.forced import forcing_grammar, guarding_grammar, reasoning_grammar
from mlx_serving.content.output import Format, OutputParser, choose_format
from mlx_serving.content.stop import compile_stops
from mlx_serving.content.stream import ChoiceText
from mlx_serving.content.template import CHATML, CHATML_TOOLS, ChatTemplate, load_templates
from mlx_serving.content.tokenizer import Tokenizer
from mlx_serving.content.tools.definitions import held_schema
from mlx_serving.content.tools.family import Tools
from mlx_serving.errors import ConfigError, InvalidRequest
from mlx_serving.types import ChatPrompt, Grammar, Prompt, TextPrompt, TokenPrompt

if TYPE_CHECKING:
    from mlx_serving.config import Config

_TAIL_TOKENS = 32
"""More than a tag that opens the reasoning ever takes."""
LONG_CHARS = 65_536
"""From here on it is worth asking whether a prompt can fit at all."""
THREAD_CHARS = 4_096
"""From here on (about a millisecond's work) a prompt is better encoded off the event loop."""


@dataclass(frozen=True, slots=True)
class Reading:
    """How a model folder becomes a text side; the settings of these names say more."""

    chat_template: str | None = None
    """The path of a Jinja file that replaces the model's own template."""
    tool_parser: str = "auto"
    reasoning_parser: str = "auto"
    threads: bool = True
    """Long prompts prefer a thread."""

    @classmethod
    def of(cls, config: Config, *, threads: bool = True) -> Reading:
        return cls(config.chat_template, config.tool_parser, config.reasoning_parser, threads)


AUTO = Reading()


class TextSide:
    """Thread-safe; one a model."""

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate | None, reading: Reading = AUTO
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        """None: the model has no chat template and its vocabulary is not ChatML's."""
        self._reading = reading
        self._formats: dict[str, Format] = {}

    @classmethod
    def load(cls, path: Path, reading: Reading = AUTO) -> TextSide:
        """Reads a model folder; tenths of a second, so off the event loop.

        A model without a template gets ChatML's if its vocabulary has `<|im_start|>`, and none
        otherwise; the same vocabulary gives a template without a place for tools a second one that
        has it. Raises ModelBroken, or ConfigError for `chat_template`.
        """
        tokenizer = Tokenizer.load(path)
        sources = (
            load_templates(path)
            if reading.chat_template is None
            else {"default": read_template(reading.chat_template)}
        )
        is_chatml = tokenizer.token_id("<|im_start|>") is not None
        if not sources and is_chatml:
            sources = {"default": CHATML}
        if not sources:
            return cls(tokenizer, None, reading)
        template = ChatTemplate(sources, tokenizer.special_tokens)
        if is_chatml and "default" in sources and not template.reads("tools", tools=True):
            template = ChatTemplate({**sources, "tool_use": CHATML_TOOLS}, tokenizer.special_tokens)
        return cls(tokenizer, template, reading)

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Token ids, at least one. Raises InvalidRequest that names the field at fault."""
        match prompt:
            case ChatPrompt():
                ids, param = self._encode_chat(prompt), "messages"
            case TextPrompt():
                param = "prompt"
                ids = self._encode(prompt.text, prompt.add_special_tokens, param)
            case TokenPrompt():
                ids, param = self._check(prompt.token_ids), "prompt"
        if not ids:
            raise InvalidRequest("the prompt is empty: it has no tokens", param=param)
        return ids

    def _encode_chat(self, prompt: ChatPrompt) -> list[int]:
        """Control tokens are the template's own; those that clients wrote are text."""
        guard = self._guard
        try:
            return guard.encode(self.render(prompt, guard))
        except InvalidRequest as error:
            error.param = error.param or "messages"
            raise

    @functools.cached_property
    def _guard(self) -> ControlGuard:
        sources = self.template.sources.values() if self.template else ()
        return ControlGuard(self.tokenizer, tuple(sources))

    def least_tokens(self, prompt: Prompt) -> int:
        """What a prompt has at least, without the seconds that tokenising megabytes takes; 0: not
        known. Templates may leave out what assistants said."""
        match prompt:
            case ChatPrompt():
                chars = sum(len(m.content or "") for m in prompt.messages if m.role != "assistant")
            case TextPrompt():
                chars = len(prompt.text)
            case TokenPrompt():
                return len(prompt.token_ids)
        return chars // self.tokenizer.longest_token if chars > LONG_CHARS else 0

    def render(self, prompt: ChatPrompt, guard: ControlGuard | None = None) -> str:
        """The chat as text, control tokens included. Raises InvalidRequest."""
        if self.template is None:
            raise InvalidRequest(
                "this model has no chat template: use /v1/completions, or start the server "
                "with --chat-template FILE",
                param="messages",
                code="no_chat_template",
            )
        if prompt.tools and not self.template.reads("tools", tools=True):
            raise InvalidRequest("this model's chat template has no place for tools", param="tools")
        return self.template.render(prompt, guard)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def open_stream(
        self,
        stop: Sequence[str] = (),
        *,
        include_stop_str: bool = False,
        min_tokens: int = 0,
        continues: bool = False,
        markup: frozenset[str] = frozenset(),
    ) -> ChoiceText:
        """The text of one choice.

        `continues`: the answer goes on from the prompt's text (a completion, or a continued
        message), so a leading space is part of it. `markup`: special tokens that a parser of the
        text needs to see.
        """
        decoder = open_detokenizer(self.tokenizer, continues=continues, markup=markup)
        return ChoiceText(
            self.tokenizer,
            decoder,
            compile_stops(tuple(stop)) if stop else None,
            include_stop_str=include_stop_str,
            min_tokens=min_tokens,
        )

    def format(self, prompt: ChatPrompt) -> Format:
        """How the model marks up its answer to this prompt."""
        if self.template is None:
            return Format()
        source = self.template.source(tools=bool(prompt.tools))
        if source not in self._formats:
            how = self._reading
            self._formats[source] = choose_format(source, how.tool_parser, how.reasoning_parser)
        return self._formats[source]

    def abilities(self) -> tuple[str, ...]:
        """Of `tools` and `thinking`, those that the chat template knows."""
        try:
            form = self.format(ChatPrompt(messages=(), tools=({},)))
        except InvalidRequest:  # its templates have other names
            return ()
        calls, thinks = form.family is not None, form.tags is not None or form.channels
        return ("tools",) * calls + ("thinking",) * thinks

    def open_parser(self, prompt: Prompt, token_ids: Sequence[int]) -> OutputParser | None:
        """A parser of one answer to a chat; None where there is nothing to look for.

        `token_ids` are the prompt's.
        """
        if not isinstance(prompt, ChatPrompt):
            return None
        form = self.format(prompt)
        if form.tags is None and not form.channels and not (form.family and prompt.tools):
            return None
        return OutputParser(
            form,
            prompt.tools,
            thinking=self._thinks(form, token_ids),
            single=not prompt.parallel_tool_calls,
        )

    def forced_calls(self, prompt: ChatPrompt, token_ids: Sequence[int]) -> Grammar | None:
        """What `tool_choice` and strict functions make of the answer; None: nothing.

        Raises InvalidRequest on `tool_choice` or `tools` where the model's format cannot be held to it.
        """
        choice, parallel = prompt.tool_choice, prompt.parallel_tool_calls
        if not prompt.tools or (choice == "auto" and not prompt.strict_tools):
            return None
        assert self.template is not None, "the prompt was rendered"
        form = self.format(prompt)
        source = self.template.source(tools=True)
        held = prompt.strict_tools if choice == "auto" else None
        functions = {
            name: held_schema(schema) if held is None or name in held else {"type": "object"}
            for name, schema in Tools(prompt.tools).schemas().items()
        }
        special, thinking = self.tokenizer.special_id, self._thinks(form, token_ids)
        param = "tools" if choice == "auto" else "tool_choice"
        if choice == "auto":
            text = guarding_grammar(
                form,
                source,
                functions,
                special,
                parallel=parallel,
                thinking=thinking,
            )
        else:
            if choice != "required":
                name = choice.removeprefix("=")
                functions = {name: functions[name]}
                parallel = False
            text = forcing_grammar(
                form, source, functions, special, parallel=parallel, thinking=thinking
            )
        if text is None:
            what = "strict functions" if choice == "auto" else "this tool_choice"
            raise InvalidRequest(
                f"this model's way to write calls cannot be held to {what}", param=param
            )
        return Grammar(kind="lark", text=text, param=param)

    def reasoning_rules(self, prompt: ChatPrompt, token_ids: Sequence[int]) -> str:
        """Lark rules for the reasoning that precedes a constrained answer; "" for none."""
        form = self.format(prompt)
        thinking = self._thinks(form, token_ids)
        return reasoning_grammar(form, self.tokenizer.special_id, thinking=thinking)

    def _thinks(self, form: Format, token_ids: Sequence[int]) -> bool:
        """Whether the prompt's end has opened the reasoning, as some templates do."""
        if form.tags is None:
            return False
        tail = self.tokenizer.decode(token_ids[-_TAIL_TOKENS:], skip_special_tokens=False)
        return tail.rstrip().endswith(form.tags.open)

    def prefers_thread(self, prompt: Prompt) -> bool:
        """Whether `encode_prompt` would hold up an event loop for about a millisecond or more."""
        if not self._reading.threads:
            return False
        match prompt:
            case ChatPrompt():
                # A tool's schema is about as long as a short message.
                size = sum(len(m.content or "") + 64 for m in prompt.messages)
                return size + 512 * len(prompt.tools) >= THREAD_CHARS
            case TextPrompt():
                return len(prompt.text) >= THREAD_CHARS
            case TokenPrompt():
                return False

    def _encode(self, text: str, add_special_tokens: bool, param: str) -> list[int]:
        try:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except InvalidRequest as error:
            raise InvalidRequest(error.message, param=param) from None

    def _check(self, token_ids: tuple[int, ...]) -> list[int]:
        limit = self.tokenizer.vocab_size
        for at, token_id in enumerate(token_ids):
            if not 0 <= token_id < limit:
                raise InvalidRequest(
                    f"token id {token_id} is outside the vocabulary of {limit}",
                    param=f"prompt[{at}]",
                )
        return list(token_ids)


def read_template(path: str) -> str:
    """The text of the setting's file. Raises ConfigError."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        why = error.strerror
    except UnicodeDecodeError:
        why = "not UTF-8 text"
    raise ConfigError(f"chat_template: cannot read {path}: {why}", param="chat_template")
