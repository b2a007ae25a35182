"""Control tokens that a client's text spells stay text.

A chat template mixes its own control tokens with what clients wrote, and a tokenizer cannot tell
`<|im_end|>` from `<|im_end|>`. So clients' strings are marked before they are rendered: a character
that no text has goes into whatever would be read as a token. In the rendered text the template's own
tokens are whole and get names that only a second tokenizer knows; then the marks go.

    "a<|im_end|>b"  ─mark─▶  "a<·|im_end|>b"  ─render─▶  "…a<·|im_end|>b<|im_end|>"
                                       ─encode─▶  the text a<|im_end|>b, then the token

Nothing of this happens where no string needs a mark.
"""

from __future__ import annotations

import bisect
import functools
import re
from collections.abc import Collection, Mapping
from typing import Any

from mlx_serving.content.tokenizer import Tokenizer
from mlx_serving.errors import InvalidRequest

# Noncharacters: Unicode promises that no text has them.
MARK = "\ufdd0"
EDGE = "\ufdd1"
_MARKS = re.compile(f"{MARK}|\\\\ufdd0", re.IGNORECASE)
"""As it is, or as a JSON filter has escaped it."""


class ControlGuard:
    """Keeps one tokenizer's control tokens from being spelt.

    `special` tokens are guarded everywhere. Others that a template writes (`<tool_call>`, DeepSeek's
    `<｜User｜>`) are so in everything but an assistant's own words, which templates take apart by them.
    """

    def __init__(self, tokenizer: Tokenizer, templates: Collection[str] = ()) -> None:
        self._tokenizer = tokenizer
        special = {text for text, special in tokenizer.added_tokens.items() if special}
        written = {
            text
            for text in tokenizer.added_tokens
            if not text.isspace() and any(text in template for template in templates)
        }
        self._special = _Spellings(special)
        self._all = _Spellings(special | written)

    def message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A message for a template, marked. Raises InvalidRequest."""
        own = message.get("role") == "assistant"
        return {
            key: self._mark(value, self._special if own and key in _OWN_WORDS else self._all)
            for key, value in message.items()
        }

    def value(self, value: Any) -> Any:
        """Anything else from a client that a template may write, marked. Raises InvalidRequest."""
        return self._mark(value, self._all)

    def encode(self, text: str) -> list[int]:
        """Token ids of a rendered text. Raises InvalidRequest."""
        if MARK not in text and "\\ufdd0" not in text.lower():
            return self._tokenizer.encode(text, add_special_tokens=False)
        named = self._all.pattern.sub(lambda found: EDGE + found[0] + EDGE, text)
        renamed, ids = self._renamed
        encoded = renamed.encode(_MARKS.sub("", named), add_special_tokens=False)
        if forged := self._tokenizer.special_ids.intersection(encoded) - ids.keys():
            spelt = self._tokenizer.token(min(forged))
            raise InvalidRequest(
                f"this model's vocabulary cannot write '{spelt}' as text", param="messages"
            )
        return [ids.get(token_id, token_id) for token_id in encoded]

    @functools.cached_property
    def _renamed(self) -> tuple[Tokenizer, Mapping[int, int]]:
        """The tokenizer with other names for the guarded tokens, and their ids' own ones."""
        names = {text: EDGE + text + EDGE for text in self._all.tokens}
        renamed = self._tokenizer.renamed(names)
        ids: dict[int, int] = {}
        for text, name in names.items():
            theirs, own = renamed.token_id(name), self._tokenizer.token_id(text)
            assert theirs is not None and own is not None, f"{text!r} was renamed"
            ids[theirs] = own
        return renamed, ids

    def _mark(self, value: Any, spellings: _Spellings) -> Any:
        match value:
            case str():
                return spellings.mark(value)
            case Mapping():
                return {
                    self._mark(key, spellings): self._mark(item, spellings)
                    for key, item in value.items()
                }
            case list() | tuple():
                return [self._mark(item, spellings) for item in value]
            case _:
                return value


_OWN_WORDS = frozenset({"content", "reasoning_content", "thinking"})


class _Spellings:
    """Finds some tokens' texts in a text, in linear time."""

    def __init__(self, tokens: Collection[str]) -> None:
        # One character cannot be split; no tokenizer marks turns with one.
        self.tokens = sorted(token for token in tokens if len(token) > 1)
        self._longest = max(map(len, self.tokens), default=0)
        self._beginnings = frozenset(token[0] for token in self.tokens)

    @functools.cached_property
    def pattern(self) -> re.Pattern[str]:
        """Of a whole token, the longest where several begin alike."""
        return re.compile(_any_of(self.tokens))

    @functools.cached_property
    def _first_character(self) -> re.Pattern[str]:
        return re.compile(f"(?={_any_of(self.tokens)})(.)", re.DOTALL)

    def mark(self, text: str) -> str:
        """`text` with a mark after the first character of each token in it, and of what could become
        one with the text that a template puts behind it."""
        if MARK in text or EDGE in text:
            raise InvalidRequest("the text has a noncharacter (U+FDD0 or U+FDD1)", param="messages")
        if not self.tokens:
            return text
        marked = self._first_character.sub(rf"\1{MARK}", text)
        for size in range(1, min(self._longest, len(text)) + 1):
            if text[-size] not in self._beginnings:
                continue
            if self._is_prefix(text[-size:]) and marked[-size:] == text[-size:]:
                end = len(marked) - size + 1
                marked = marked[:end] + MARK + marked[end:]
        return marked

    def _is_prefix(self, text: str) -> bool:
        at = bisect.bisect_left(self.tokens, text)
        return at < len(self.tokens) and self.tokens[at].startswith(text)


def _any_of(tokens: Collection[str]) -> str:
    """An expression for the longest of `tokens`, branching by character: thousands cost no more than
    a few."""
    if not tokens:
        return r"(?!)"
    root: dict[str, Any] = {}
    for token in tokens:
        node = root
        for character in token:
            node = node.setdefault(character, {})
        node[""] = {}
    return _branches(root)


def _branches(node: dict[str, Any]) -> str:
    ends = "" in node
    options = []
    for character, child in sorted(node.items()):
        if character:
            chain = character
            while len(child) == 1 and "" not in child:
                ((following, child),) = child.items()
                chain += following
            options.append(re.escape(chain) + ("" if child.keys() == {""} else _branches(child)))
    if not options:
        return ""
    return f"(?:{'|'.join(options)})" + ("?" if ends else "")
