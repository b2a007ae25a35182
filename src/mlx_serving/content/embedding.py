"""Texts for vectors and pairs for ranking as token ids: prompts, cutting, the end of the text.

A text that is too long is cut at its end, before the special tokens that close it; of a pair, the
second text is cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlx_serving.content.judged import ask, document_ids, takes_instruction
from mlx_serving.content.tokenizer import Tokenizer
from mlx_serving.errors import ContextOverflow, InvalidRequest
from mlx_serving.types import EmbedRequest, ModelInfo, RankRequest, TextPrompt

if TYPE_CHECKING:
    from tokenizers import Encoding

_QUERY = ("query",)
_DOCUMENT = ("document", "passage", "corpus")
"""Names that models give their prompts for either side of a search."""


@dataclass(frozen=True, slots=True)
class Text:
    """What the model reads at once."""

    token_ids: list[int]
    second_at: int | None = None
    """Where the second text of a pair begins, if the model tells them apart."""


def read_embed(request: EmbedRequest, info: ModelInfo, tokenizer: Tokenizer) -> list[Text]:
    """One text for each input. Raises InvalidRequest, ContextOverflow, naming the input."""
    prompt = _named_prompt(request, info)
    limit = info.max_input_tokens
    keep = _kept(request, limit)
    plain = [prompt + item.text for item in request.inputs if isinstance(item, TextPrompt)]
    encoded = iter(_encode(tokenizer, plain, request.param))
    texts = []
    for i, item in enumerate(request.inputs):
        at = request.at(i)
        if isinstance(item, TextPrompt):
            text = _close(next(encoded), info, tokenizer, keep, at)
        else:
            _check_ids(item.token_ids, info, at)
            text = Text(list(item.token_ids[:keep]))
        texts.append(_fitting(text, limit, info, at))
    return texts


def read_pairs(request: RankRequest, info: ModelInfo, tokenizer: Tokenizer) -> list[Text]:
    """The query with each document, for a reranker."""
    _check_instruction(request, info)
    if info.rank_form:
        return _read_questions(request, info, tokenizer)
    limit = info.max_input_tokens
    keep = _kept(request, limit)
    encoded = tokenizer.encode_texts([(request.query, d) for d in request.documents])
    texts = []
    for i, encoding in enumerate(encoded):
        length = _length_of_pair(encoding, request.max_document_tokens)
        wanted = length if keep is None else min(length, keep)
        text = _cut(encoding, wanted, f"documents[{i}]")
        texts.append(_fitting(text, limit, info, f"documents[{i}]"))
    return texts


def read_sides(request: RankRequest, info: ModelInfo, tokenizer: Tokenizer) -> list[Text]:
    """The query and then each document by itself, for an embedder."""
    _check_instruction(request, info)
    limit = info.max_input_tokens
    keep = _kept(request, limit)
    most = [n for n in (keep, request.max_document_tokens) if n is not None]
    query = _prompt_for(info, _QUERY) + request.query
    document = _prompt_for(info, _DOCUMENT)
    encoded = tokenizer.encode_texts([query, *(document + d for d in request.documents)])
    names = ["query", *(f"documents[{i}]" for i in range(len(request.documents)))]
    kept = [keep, *[min(most, default=None)] * len(request.documents)]
    return [
        _fitting(_close(e, info, tokenizer, k, at), limit, info, at)
        for e, k, at in zip(encoded, kept, names, strict=True)
    ]


def _read_questions(request: RankRequest, info: ModelInfo, tokenizer: Tokenizer) -> list[Text]:
    limit = info.max_input_tokens
    keep = _kept(request, limit)
    try:
        asked = ask(info.rank_form, request.query, request.instruction, tokenizer)
    except InvalidRequest as error:
        raise InvalidRequest(error.message, param="query") from None
    around = len(asked.before) + len(asked.after)
    texts = []
    for i, document in enumerate(request.documents):
        at = f"documents[{i}]"
        ids = document_ids(document, tokenizer)[: request.max_document_tokens]
        if keep is not None and around + len(ids) > keep:
            if keep <= around:
                raise ContextOverflow(f"Cut to {keep} tokens, nothing is left of '{at}'.", param=at)
            ids = ids[: keep - around]
        texts.append(_fitting(Text([*asked.before, *ids, *asked.after]), limit, info, at))
    return texts


def _check_instruction(request: RankRequest, info: ModelInfo) -> None:
    if request.instruction is not None and not takes_instruction(info.rank_form):
        raise InvalidRequest(f"'{info.model_id}' takes no instruction.", param="instruction")


def _kept(request: EmbedRequest | RankRequest, limit: int) -> int | None:
    """Tokens to which a longer text is cut; None: it is refused instead."""
    return None if request.truncate is None else min(request.truncate, limit)


def _named_prompt(request: EmbedRequest, info: ModelInfo) -> str:
    name = request.prompt_name
    if name is None:
        return _prompt_for(info, ())
    if name not in info.prompts:
        known = ", ".join(sorted(info.prompts)) or "none"
        raise InvalidRequest(
            f"'{info.model_id}' has no prompt {name[:64]!r}; it has: {known}.", param="prompt_name"
        )
    if not all(isinstance(item, TextPrompt) for item in request.inputs):
        raise InvalidRequest("A prompt cannot precede token ids.", param="prompt_name")
    return info.prompts[name]


def _prompt_for(info: ModelInfo, names: Sequence[str]) -> str:
    wanted = [*names, info.default_prompt or ""]
    return next((info.prompts[name] for name in wanted if name in info.prompts), "")


def _encode(tokenizer: Tokenizer, texts: Sequence[str], param: str) -> list[Encoding]:
    try:
        return tokenizer.encode_texts(texts)
    except InvalidRequest as error:
        raise InvalidRequest(error.message, param=param) from None


def _close(
    encoding: Encoding, info: ModelInfo, tokenizer: Tokenizer, keep: int | None, at: str
) -> Text:
    """The text at most `keep` tokens long, with the model's end where it wants one."""
    end = []
    if info.append_eos and tokenizer.eos_token_id is not None:
        closed = len(encoding) > 0 and encoding.sequence_ids[-1] is None
        end = [] if closed else [tokenizer.eos_token_id]
    most = len(encoding) if keep is None else max(0, keep - len(end))
    text = _cut(encoding, most, at)
    return Text([*text.token_ids, *end], text.second_at) if end else text


def _cut(encoding: Encoding, most: int, at: str) -> Text:
    """At most `most` tokens, dropping from the end of the last text, whatever surrounds that."""
    ids, kinds = encoding.ids, encoding.type_ids
    excess = len(ids) - most
    if excess > 0:
        owners = encoding.sequence_ids
        last = max((owner for owner in owners if owner is not None), default=0)
        own = [i for i, owner in enumerate(owners) if owner == last]
        if excess > len(own):
            raise ContextOverflow(f"Cut to {most} tokens, nothing is left of '{at}'.", param=at)
        gone = set(own[len(own) - excess :])
        ids = [x for i, x in enumerate(ids) if i not in gone]
        kinds = [x for i, x in enumerate(kinds) if i not in gone]
    return Text(ids, kinds.index(1) if 1 in kinds else None)


def _length_of_pair(encoding: Encoding, most: int | None) -> int:
    """Its length once the second text has at most `most` tokens."""
    if most is None:
        return len(encoding)
    second = sum(owner == 1 for owner in encoding.sequence_ids)
    return len(encoding) - max(0, second - most)


def _fitting(text: Text, limit: int, info: ModelInfo, at: str) -> Text:
    count = len(text.token_ids)
    if not count:
        raise InvalidRequest(f"'{at}' is empty: it has no tokens.", param=at)
    if count > limit:
        raise ContextOverflow(
            f"'{at}' has {count} tokens; '{info.model_id}' takes at most {limit}.", param=at
        )
    return text


def _check_ids(token_ids: Sequence[int], info: ModelInfo, at: str) -> None:
    for token_id in token_ids:
        if not 0 <= token_id < info.vocab_size:
            raise InvalidRequest(
                f"Token id {token_id} is not in the vocabulary of {info.vocab_size}.", param=at
            )
