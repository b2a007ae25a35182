"""A model folder's tokenizer: text to token ids and back, without transformers.

Reads what transformers' fast tokenizers read, to the same effect: `tokenizer.json`, and from
`tokenizer_config.json` (and `special_tokens_map.json`, for folders written before the former
listed added tokens) the named special tokens and tokens to add. What is put around a text is
tokenizer.json's post-processor's business; only where it has none do `add_bos_token` and
`add_eos_token` of the configuration decide (transformers 5 ignores them even then, 4 did not).
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_serving.errors import InvalidRequest, ModelBroken

if TYPE_CHECKING:
    import tokenizers

    from mlx_serving.content.detokenize import Pieces


class Tokenizer:
    """Thread-safe: nothing changes after construction but caches.

    Attributes:
        vocab_size: every known id is below it. The model's embedding may have more rows.
        special_tokens: names (`bos_token`, …) and texts, as chat templates see them.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, special_tokens: Mapping[str, str] | None = None
    ) -> None:
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self.vocab_size = max(
            [backend.get_vocab_size(with_added_tokens=True), *(i + 1 for i in added)]
        )
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.special_tokens = dict(special_tokens or {})
        self._texts: dict[int, tuple[str, bytes]] = {}
        self._pieces: dict[frozenset[int], Pieces] = {}
        self.bos_token_id = self._named_id("bos_token")
        self.eos_token_id = self._named_id("eos_token")

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Raises ModelBroken when the folder's tokenizer files are missing or unreadable.

        Takes 0.1 s for 50,000 tokens, and the library holds the GIL meanwhile.
        """
        # One prompt has nothing to do in parallel: the pool would only add threads.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        import tokenizers

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelBroken(f"{folder} has no tokenizer.json")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ModelBroken(f"{path} cannot be read: {error}") from error
        config = read_json(folder / "tokenizer_config.json")
        if "added_tokens_decoder" not in config:
            config |= read_json(folder / "special_tokens_map.json")
        return cls(backend, _configure(backend, config))

    def encode(
        self, text: str, *, add_special_tokens: bool, parse_special_tokens: bool = True
    ) -> list[int]:
        """Token ids of `text`.

        `add_special_tokens` adds what the tokenizer's configuration adds around a text (a
        BOS token, mostly). A rendered chat is encoded without, for its template has written
        them. `parse_special_tokens=False` reads control tokens in the text as plain characters;
        a chat, which mixes its template's with its clients' text, is `ControlGuard`'s business.

        Releases the GIL. Raises InvalidRequest for text that is not valid Unicode.
        """
        backend = self._backend if parse_special_tokens else self._literal_backend
        try:
            # The library's plain encode() holds the GIL, a second for a megabyte; its batches do not.
            (encoding,) = backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeEncodeError):
            raise InvalidRequest("the text has a lone surrogate: it is not valid Unicode") from None
        return encoding.ids

    def encode_texts(
        self, texts: Sequence[str] | Sequence[tuple[str, str]]
    ) -> list[tokenizers.Encoding]:
        """Texts, or pairs of them, with what the configuration adds around each. Releases the GIL.

        Raises InvalidRequest for text that is not valid Unicode.
        """
        try:
            return self._backend.encode_batch_fast(list(texts), add_special_tokens=True)
        except (TypeError, UnicodeEncodeError):
            raise InvalidRequest("a text has a lone surrogate: it is not valid Unicode") from None

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of a whole sequence; ids that the tokenizer does not know are left out."""
        skipped = self.special_ids if skip_special_tokens else frozenset[int]()
        known = [i for i in token_ids if 0 <= i < self.vocab_size and i not in skipped]
        if not known:  # a decoder that strips the end panics on nothing
            return ""
        return self._backend.decode(known, skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> tuple[str, bytes]:
        """One token by itself, a special one too: its text (U+FFFD for part of a character) and its
        UTF-8; nothing for an unknown id."""
        known = self._texts.get(token_id)
        if known is None:
            piece = self.pieces[token_id]
            raw = piece.encode() if isinstance(piece, str) else piece
            known = self._texts[token_id] = (raw.decode(errors="replace"), raw)
        return known

    def token_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def token(self, token_id: int) -> str | None:
        """The vocabulary's own spelling (`Ġthe`, `<0x0A>`), or None for an unknown id."""
        return self._backend.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None

    @functools.cached_property
    def decoder_spec(self) -> dict[str, Any] | None:
        """The decoder as `tokenizer.json` describes it."""
        decoder = self._backend.decoder
        if decoder is None:
            return None
        spec: dict[str, Any] = json.loads(decoder.__getstate__())
        return spec

    @functools.cached_property
    def pieces(self) -> Pieces:
        from mlx_serving.content.detokenize import Pieces

        return Pieces(self, skipped=frozenset())

    @functools.cached_property
    def spoken_pieces(self) -> Pieces:
        """As `pieces`, with special tokens as nothing."""
        from mlx_serving.content.detokenize import Pieces

        return Pieces(self, skipped=self.special_ids)

    def pieces_with(self, markup: frozenset[str]) -> Pieces:
        """As `spoken_pieces`, with those special tokens spoken that `markup` names."""
        from mlx_serving.content.detokenize import Pieces

        skipped = self.special_ids - {self.token_id(text) for text in markup}
        if skipped not in self._pieces:
            self._pieces[skipped] = Pieces(self, skipped=skipped)
        return self._pieces[skipped]

    def special_id(self, text: str) -> int | None:
        """The id of a special token; None if the text is none."""
        token_id = self.token_id(text)
        return token_id if token_id in self.special_ids else None

    @property
    def added_tokens(self) -> Mapping[str, bool]:
        """The texts that are found before all others, and whether each is a special token."""
        added = self._backend.get_added_tokens_decoder().values()
        return {token.content: token.special for token in added}

    @functools.cached_property
    def longest_token(self) -> int:
        """Characters of a text that one token stands for at most."""
        return max(map(len, self._backend.get_vocab()), default=1)

    def renamed(self, names: Mapping[str, str]) -> Tokenizer:
        """A copy in which added tokens go by other names, under ids of its own."""
        import tokenizers

        spec = json.loads(self._backend.to_str())
        for token in spec["added_tokens"]:
            if token["content"] in names:
                # Found as written, between whatever letters.
                token |= {
                    "content": names[token["content"]],
                    "normalized": False,
                    "single_word": False,
                }
        return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(spec)))

    @functools.cached_property
    def _literal_backend(self) -> tokenizers.Tokenizer:
        # A copy: the switch is the backend's state, and other threads encode meanwhile.
        import tokenizers

        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.encode_special_tokens = True
        return backend

    def _named_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.token_id(token)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is no file. Raises ModelBroken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelBroken(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelBroken(f"{path} does not hold a JSON object")
    return value


def _configure(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> dict[str, str]:
    """Apply tokenizer_config.json to the backend; returns the named special tokens."""
    backend.no_truncation()
    backend.no_padding()
    special = _special_tokens(config)
    _add_tokens(backend, config, special)
    if backend.post_processor is None:
        _set_post_processor(
            backend,
            bos=special.get("bos_token") if config.get("add_bos_token") else None,
            eos=special.get("eos_token") if config.get("add_eos_token") else None,
        )
    return special


def _text(token: Any) -> str | None:
    """A token in a config is its text, or an object that describes an added token."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    named = {key: _text(value) for key, value in config.items() if key.endswith("_token")}
    extra = config.get("extra_special_tokens")
    if isinstance(extra, dict):
        named |= {key: _text(value) for key, value in extra.items()}
    return {key: text for key, text in named.items() if text is not None}


def _add_tokens(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], special: Mapping[str, str]
) -> None:
    """Add the tokens that the configuration names and tokenizer.json lacks, in the order of their ids."""
    from tokenizers import AddedToken

    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    listed = config.get("added_tokens_decoder") or {}
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    wanted = [
        AddedToken(entry["content"], **{f: bool(entry[f]) for f in flags if f in entry})
        for _, entry in sorted(listed.items(), key=lambda item: int(item[0]))
        if isinstance(entry, dict) and isinstance(entry.get("content"), str)
    ]
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or ()
    names = [*special.values(), *(_text(t) for t in extra if not isinstance(extra, dict))]
    wanted += [AddedToken(name, special=True, normalized=False) for name in names if name]
    fresh = {token.content: token for token in reversed(wanted) if token.content not in known}
    if fresh:
        backend.add_tokens(list(reversed(fresh.values())))


def _set_post_processor(backend: tokenizers.Tokenizer, *, bos: str | None, eos: str | None) -> None:
    from tokenizers.processors import TemplateProcessing

    tokens = [(t, i) for t in (bos, eos) if t and (i := backend.token_to_id(t)) is not None]
    names = {t for t, _ in tokens}
    head = [f"{bos}:0"] if bos in names else []
    tail = [f"{eos}:0"] if eos in names else []
    backend.post_processor = TemplateProcessing(
        single=" ".join([*head, "$A:0", *tail]),
        pair=" ".join([*head, "$A:0", *tail, "$B:1"]),
        special_tokens=tokens,
    )
