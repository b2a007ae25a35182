"""Token ids to text as they come: whole characters only, constant work a token.

Every decoder in use for language models gives each token bytes of its own: ByteLevel (GPT-2,
Llama 3, Qwen) spells them in a 256-letter alphabet; SentencePiece-like ones write text with
`▁` for a space and `<0xE2>` for a byte. So a stream is the tokens' bytes, joined and read as
UTF-8, with a leading space taken off where the decoder says so. A token whose bytes are
whole characters is kept as `str`, and the hot path returns it as it is. The few other decoders
(WordPiece, CTC, …) are read through the library, a short window at a time.

For valid text the increments join to exactly `Tokenizer.decode`. Invalid bytes give one U+FFFD
for each maximal invalid part, as for ByteLevel there; the library's byte fallback would
give one for each byte, and take back valid characters next to them.
"""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from mlx_serving.content.tokenizer import Tokenizer

_UTF8 = codecs.getincrementaldecoder("utf-8")
_WINDOW = 16
"""Tokens that the windowed decoder looks back on; more than a character ever takes."""
_STRIP_ALL = -1


class Detokenizer(Protocol):
    def push(self, token_id: int) -> str:
        """The characters that this token completes; often its text, "" while one is incomplete."""

    def finish(self) -> str:
        """What is still held back, as U+FFFD; nothing may be pushed after it."""


def open_detokenizer(
    tokenizer: Tokenizer,
    *,
    continues: bool = False,
    markup: frozenset[str] = frozenset(),
) -> Detokenizer:
    """A decoder for one stream.

    `continues`: the stream goes on from a text, so a leading space belongs to it (a
    completion); otherwise it is taken off where the tokenizer's decoder does (a chat turn).
    `markup`: special tokens that a parser of the text needs to see all the same.
    """
    pieces = tokenizer.pieces_with(markup) if markup else tokenizer.spoken_pieces
    if pieces.tabled:
        return _TableDetokenizer(pieces, 0 if continues else pieces.strip_start)
    return _WindowDetokenizer(tokenizer, pieces.skipped)


class Pieces(dict[int, str | bytes]):
    """What each token adds to the text: `str` where its bytes are whole characters, else bytes.

    Filled as tokens are met. "" for unknown ids and for special tokens that are skipped.

    Attributes:
        tabled: tokens can be decoded one by one.
        skipped: special tokens that are not part of the text.
        strip_start: leading spaces that the decoder takes off a text (-1: all of the first token's).
    """

    def __init__(self, tokenizer: Tokenizer, *, skipped: frozenset[int]) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self.skipped = skipped
        steps = _flatten(tokenizer.decoder_spec)
        self._kind, self._replace, self.strip_start = _classify(steps)
        self.tabled = self._kind != "other"

    def __missing__(self, token_id: int) -> str | bytes:
        piece = self._piece(token_id)
        self[token_id] = piece
        return piece

    def _piece(self, token_id: int) -> str | bytes:
        token = self._tokenizer.token(token_id)
        if token is None or token_id in self.skipped:
            return ""
        if self._kind == "other":
            return self._tokenizer.decode([token_id], skip_special_tokens=False)
        if self._kind == "byte_level":
            return _whole_or_raw(_byte_level(token))
        for old, new in self._replace:
            token = token.replace(old, new)
        byte = _fallback_byte(token) if self._kind == "byte_fallback" else None
        return token if byte is None else _whole_or_raw(byte)


class _TableDetokenizer:
    __slots__ = ("_pieces", "_plain", "_strip", "_utf8")

    def __init__(self, pieces: Pieces, strip_start: int) -> None:
        self._pieces = pieces
        self._utf8 = _UTF8("replace")
        self._strip = strip_start
        self._plain = strip_start == 0
        """Neither bytes are pending nor leading spaces to be taken off."""

    def push(self, token_id: int) -> str:
        piece = self._pieces[token_id]
        if self._plain and piece.__class__ is str:
            return piece
        return self._push_slowly(piece)

    def _push_slowly(self, piece: str | bytes) -> str:
        if not piece:
            return ""
        text = self._utf8.decode(piece.encode() if isinstance(piece, str) else piece)
        if self._strip and text:
            text = self._take_off_spaces(text)
        self._plain = not self._strip and not self._utf8.getstate()[0]
        return text

    def _take_off_spaces(self, text: str) -> str:
        if self._strip == _STRIP_ALL:
            self._strip = 0
            return text.replace(" ", "")
        while self._strip and text.startswith(" "):
            text = text[1:]
            self._strip -= 1
        if text:
            self._strip = 0
        return text

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowDetokenizer:
    """Decodes the last tokens with and without the newest, for decoders that join words by context."""

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._window: list[int] = []
        self._read = 0
        """How many of the window's tokens have been given out."""

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        self._window.append(token_id)
        return self._advance(force=len(self._window) >= _WINDOW)

    def finish(self) -> str:
        return self._advance(force=True)

    def _advance(self, *, force: bool) -> str:
        before, after = self._decode(self._window[: self._read]), self._decode(self._window)
        if len(after) <= len(before) or (after.endswith("\ufffd") and not force):
            if force:
                del self._window[: self._read]
                self._read = len(self._window)
            return ""
        del self._window[: self._read]
        self._read = len(self._window)
        return after[len(before) :]

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)


def _flatten(spec: dict[str, Any] | None) -> list[dict[str, Any]]:
    if spec is None:
        return []
    if spec.get("type") == "Sequence":
        return [step for inner in spec["decoders"] for step in _flatten(inner)]
    return [spec]


def _classify(steps: list[dict[str, Any]]) -> tuple[str, list[tuple[str, str]], int]:
    """(kind, replacements, leading spaces taken off) of a decoder; kind "other" is not tabled."""
    other: tuple[str, list[tuple[str, str]], int] = ("other", [], 0)
    names = [step["type"] for step in steps]
    if names == ["ByteLevel"]:
        return "byte_level", [], 0
    if names == ["Metaspace"]:
        never = steps[0].get("prepend_scheme") == "never"
        return "text", [(steps[0]["replacement"], " ")], 0 if never else _STRIP_ALL
    replace: list[tuple[str, str]] = []
    while steps and steps[0]["type"] == "Replace":
        pattern = steps[0]["pattern"].get("String")
        if pattern is None:
            return other
        replace.append((pattern, steps[0]["content"]))
        steps = steps[1:]
    kind = "text"
    if steps and steps[0]["type"] == "ByteFallback":
        kind, steps = "byte_fallback", steps[1:]
    if [step["type"] for step in steps] == ["Fuse"]:
        return kind, replace, 0
    if [step["type"] for step in steps] == ["Fuse", "Strip"]:
        strip = steps[1]
        if strip["content"] == " " and strip["stop"] == 0:
            return kind, replace, strip["start"]
    return other


def _whole_or_raw(raw: bytes) -> str | bytes:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letters for the 256 bytes: printable Latin-1 stands for itself, the rest from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(rest)}


_ALPHABET = _byte_alphabet()


def _byte_level(token: str) -> bytes:
    try:
        return bytes([_ALPHABET[letter] for letter in token])
    except KeyError:  # an added token: its own text
        return token.encode()


def _fallback_byte(token: str) -> bytes | None:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            return None
    return None
