"""One choice's tokens to the text that its reader gets: decoding and stop strings joined."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from mlx_serving.content.detokenize import Detokenizer
from mlx_serving.content.stop import StopMatcher, StopStrings
from mlx_serving.content.tokenizer import Tokenizer
from mlx_serving.types import TextLogprob, TokenLogprob


class Delta(msgspec.Struct, gc=False):
    """What a push gave.

    Attributes:
        text: new whole characters; "" while a character or a possible stop string is incomplete.
        token_ids: the tokens that count: those pushed, up to the one that completed a stop string.
        stop: the stop string that ended the choice, if one did.
        logprobs: one for each of `token_ids`, if they were pushed.
    """

    text: str
    token_ids: list[int]
    stop: str | None = None
    logprobs: list[TextLogprob] | None = None


class ChoiceText:
    """A choice's text as its tokens come. Once a stop string is found, further tokens are ignored.

    `min_tokens`: in the text of so many first tokens no stop string is looked for.
    """

    __slots__ = ("_decoder", "_include_stop", "_matcher", "_skip", "_tokenizer")

    def __init__(
        self,
        tokenizer: Tokenizer,
        decoder: Detokenizer,
        stops: StopStrings | None = None,
        *,
        include_stop_str: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._tokenizer = tokenizer
        self._decoder = decoder
        self._matcher = None if stops is None else StopMatcher(stops)
        self._include_stop = include_stop_str
        self._skip = min_tokens

    @property
    def stop(self) -> str | None:
        """The stop string that ended the choice."""
        return None if self._matcher is None else self._matcher.stop

    def push(
        self,
        token_ids: list[int],
        logprobs: Sequence[TokenLogprob] | None = None,
        *,
        stop_token_id: int | None = None,
    ) -> Delta:
        """The next tokens. `stop_token_id`, when the last of them ended the sequence, keeps
        its text out (it counts as a token all the same)."""
        if stop_token_id is not None and token_ids and token_ids[-1] == stop_token_id:
            spoken, silent = token_ids[:-1], True
        else:
            spoken, silent = token_ids, False
        if self._matcher is None:
            push = self._decoder.push
            text = push(spoken[0]) if len(spoken) == 1 else "".join(map(push, spoken))
            delta = Delta(text, token_ids)
        elif self._matcher.stop is not None:
            return Delta("", [])
        else:
            delta = self._push_until_stop(self._matcher, spoken)
            if silent and delta.stop is None:
                delta.token_ids = token_ids
        if logprobs is not None:
            pairs = zip(delta.token_ids, logprobs, strict=False)
            delta.logprobs = [text_logprob(self._tokenizer, i, entry) for i, entry in pairs]
        return delta

    def _push_until_stop(self, matcher: StopMatcher, token_ids: list[int]) -> Delta:
        parts: list[str] = []
        for used, token_id in enumerate(token_ids, 1):
            text = self._decoder.push(token_id)
            if self._skip:
                self._skip -= 1
                parts.append(text)
                continue
            parts.append(matcher.push(text))
            if matcher.stop is not None:
                if self._include_stop:
                    parts.append(matcher.stop)
                return Delta("".join(parts), token_ids[:used], matcher.stop)
        return Delta("".join(parts), token_ids)

    def finish(self) -> str:
        """The text held back, when the sequence ended otherwise; "" after a stop string.

        Nothing may be pushed after it. A stop string that only an incomplete character's
        U+FFFD would complete is not looked for.
        """
        if self._matcher is None:
            return self._decoder.finish()
        if self._matcher.stop is not None:
            return ""
        return self._matcher.finish() + self._decoder.finish()


def text_logprob(tokenizer: Tokenizer, token_id: int, entry: TokenLogprob) -> TextLogprob:
    """With the tokens' texts and bytes. Part of a character has U+FFFD for text: see its bytes."""
    spell = tokenizer.token_text
    text, raw = spell(token_id)
    top = tuple(
        (*spell(i), logprob) for i, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True)
    )
    return TextLogprob(token=text, raw=raw, logprob=entry.logprob, top=top)
