"""The text side of one model: prompts to token ids, token streams to text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlx_serving.content.detokenize import open_detokenizer
from mlx_serving.content.stop import compile_stops
from mlx_serving.content.stream import ChoiceText
from mlx_serving.content.template import CHATML, ChatTemplate, load_templates
from mlx_serving.content.tokenizer import Tokenizer
from mlx_serving.errors import ConfigError, InvalidRequest
from mlx_serving.types import ChatPrompt, Prompt, TextPrompt, TokenPrompt

THREAD_CHARS = 4_096
"""From here on (about a millisecond's work) a prompt is better encoded off the event loop."""


class TextSide:
    """Thread-safe; one a model."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None) -> None:
        self.tokenizer = tokenizer
        self.template = template
        """None: the model has no chat template and its vocabulary is not ChatML's."""

    @classmethod
    def load(cls, path: Path, chat_template: str | None = None) -> TextSide:
        """Reads a model folder; tenths of a second, so off the event loop.

        `chat_template` is the path of a Jinja file that replaces the model's own. A model without
        a template gets ChatML's if its vocabulary has `<|im_start|>`, and none otherwise.
        Raises ModelBroken, or ConfigError for `chat_template`.
        """
        tokenizer = Tokenizer.load(path)
        sources = load_templates(path) if chat_template is None else _read_override(chat_template)
        if not sources and tokenizer.token_id("<|im_start|>") is not None:
            sources = {"default": CHATML}
        template = ChatTemplate(sources, tokenizer.special_tokens) if sources else None
        return cls(tokenizer, template)

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Token ids, at least one. Raises InvalidRequest that names the field at fault."""
        match prompt:
            case ChatPrompt():
                ids, param = self._encode(self.render(prompt), False, "messages"), "messages"
            case TextPrompt():
                param = "prompt"
                ids = self._encode(prompt.text, prompt.add_special_tokens, param)
            case TokenPrompt():
                ids, param = self._check(prompt.token_ids), "prompt"
        if not ids:
            raise InvalidRequest("the prompt is empty: it has no tokens", param=param)
        return ids

    def render(self, prompt: ChatPrompt) -> str:
        """The chat as text, control tokens included. Raises InvalidRequest."""
        if self.template is None:
            raise InvalidRequest(
                "this model has no chat template: use /v1/completions, or start the server "
                "with --chat-template FILE",
                param="messages",
                code="no_chat_template",
            )
        return self.template.render(prompt)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def open_stream(
        self,
        stop: Sequence[str] = (),
        *,
        include_stop_str: bool = False,
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
        continues: bool = False,
    ) -> ChoiceText:
        """The text of one choice.

        `continues`: the answer goes on from the prompt's text (a completion, or a continued
        message), so a leading space is part of it.
        """
        decoder = open_detokenizer(
            self.tokenizer, skip_special_tokens=skip_special_tokens, continues=continues
        )
        return ChoiceText(
            self.tokenizer,
            decoder,
            compile_stops(tuple(stop)) if stop else None,
            include_stop_str=include_stop_str,
            min_tokens=min_tokens,
        )

    def prefers_thread(self, prompt: Prompt) -> bool:
        """Whether `encode_prompt` would hold up an event loop for about a millisecond or more."""
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


def _read_override(path: str) -> dict[str, str]:
    try:
        return {"default": Path(path).read_text(encoding="utf-8")}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}", param="--chat-template") from error
