"""Grammars compiled against one model's vocabulary, and how far each sequence has got in its own.

    Grammar ──compile──▶ CompiledGrammar ──matcher──▶ a GrammarMatcher a sequence: accept, mask

llguidance does the work; it is imported when first needed. Everything it does is bounded by
`_limits`, because masks are computed between the steps of other requests. Compiling is done on threads
beside them (`runtime.compiles`).
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from mlx_serving.errors import InvalidRequest, MLXServingError, UnsupportedParameter
from mlx_serving.runtime.backend.runaway import Bounds, Runs, Vocabulary
from mlx_serving.types import Grammar
from mlx_serving.worker.wire import ModelOptions

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

MAX_CACHED = 64
"""Compiled grammars kept for a model: clients send the same few over and over."""
MAX_ERROR_CHARS = 400
_JSON_OPTIONS: dict[str, Any] = {
    "item_separator": ",",
    "key_separator": ":",
    # Nothing is approximated: what cannot be followed is refused.
    "lenient": False,
    "coerce_one_of": False,
}


def tokenizer_file(path: Path, options: ModelOptions) -> Path:
    """The tokenizer.json of the model in `path`."""
    return Path(options.tokenizer_path or path) / "tokenizer.json"


class Grammars:
    """Compiles grammars for one model.

    Args:
        tokenizer: the model's tokenizer.json.
        vocab_size: the logits' width.
        eos_token_ids: what may come once a grammar is satisfied.
        bounds: what may not run away in JSON.
    """

    def __init__(
        self,
        tokenizer: Path,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        bounds: Bounds | None = None,
    ) -> None:
        self._path = tokenizer
        self._vocab_size = vocab_size
        self._eos = list(eos_token_ids)
        self._tokenizer: Future[LLTokenizer] = Future()
        self._bounds = bounds or Bounds()
        self._vocabulary: Vocabulary | None = None
        self._reading = threading.Lock()
        self._compiled: OrderedDict[_Key, LLMatcher] = OrderedDict()
        self._keeping = threading.Lock()

    def warm(self) -> None:
        """Read the vocabulary (tenths of a second) on a thread, before the first grammar needs it."""
        threading.Thread(target=self._read, name="grammar-vocabulary", daemon=True).start()

    def known(self, grammar: Grammar) -> CompiledGrammar | None:
        """At once, if it was compiled lately."""
        key = _key(grammar)
        with self._keeping:
            compiled = self._compiled.get(key)
            if compiled is None:
                return None
            self._compiled.move_to_end(key)
        return self._constraint(grammar, compiled)

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Milliseconds, or nothing if it was compiled lately. Raises InvalidRequest."""
        found = self.known(grammar)
        if found is not None:
            return found
        compiled = self._compile(grammar)
        with self._keeping:
            self._compiled[_key(grammar)] = compiled
            if len(self._compiled) > MAX_CACHED:
                self._compiled.popitem(last=False)
        return self._constraint(grammar, compiled)

    def _constraint(self, grammar: Grammar, compiled: LLMatcher) -> CompiledGrammar:
        # Forced calls are Lark around JSON.
        has_json = grammar.kind in ("json_schema", "json_object") or "%json" in grammar.text
        vocabulary = self._vocabulary if has_json else None
        return CompiledGrammar(compiled, frozenset(self._eos), grammar.param, vocabulary)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        self._read()
        if (broken := self._tokenizer.exception()) is not None:
            raise UnsupportedParameter(
                f"This model's output cannot be constrained: {broken}", param=grammar.param
            )
        if grammar.before:
            # By itself first: behind free text, what nothing satisfies would show too late.
            self._compile(msgspec.structs.replace(grammar, before=""))
        from llguidance import LLMatcher

        try:
            matcher = LLMatcher(
                self._tokenizer.result(),
                _definition(self._spaced(grammar)),
                log_level=0,
                limits=_limits(),
            )
        except ValueError as e:
            raise InvalidRequest(f"'{grammar.param}': {e}.", param=grammar.param) from None
        # The first mask finds out what compiling does not: a grammar that nothing satisfies.
        if not matcher.is_error():
            matcher.compute_bitmask()
        if matcher.is_error():
            raise InvalidRequest(
                f"'{grammar.param}' cannot be followed: {_reason(matcher)}", param=grammar.param
            )
        matcher.reset()
        return matcher

    def _spaced(self, grammar: Grammar) -> Grammar:
        """With the server's bound on white space, where the request has none of its own."""
        if grammar.white_space is not None:
            return grammar
        return msgspec.structs.replace(grammar, white_space=self._bounds.white_space_pattern)

    def _read(self) -> None:
        with self._reading:
            if self._tokenizer.done():
                return
            try:
                self._tokenizer.set_result(self._load())
            except Exception as e:
                self._tokenizer.set_exception(e)

    def _load(self) -> LLTokenizer:
        if not self._eos:
            raise ValueError("it has no token that ends a sequence")
        tokenizer, self._vocabulary = _READ.get(
            self._path, self._vocab_size, tuple(self._eos), self._bounds
        )
        return tokenizer


_Key = tuple[str, str, str | None, str]


def _key(grammar: Grammar) -> _Key:
    return grammar.kind, grammar.text, grammar.white_space, grammar.before


class ReadTokenizers:
    """Those that were read last, for models that come back: reading one takes tenths of a second, and the
    library holds the interpreter, which no other model's stream gets on without."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: OrderedDict[tuple[object, ...], tuple[LLTokenizer, Vocabulary]] = OrderedDict()
        self._lock = threading.Lock()

    def get(
        self, path: Path, vocab_size: int, eos: tuple[int, ...], bounds: Bounds
    ) -> tuple[LLTokenizer, Vocabulary]:
        """Raises what a file that cannot be read, or is no tokenizer, leads to."""
        at = path.stat()
        key = (path, at.st_ino, at.st_size, at.st_mtime_ns, vocab_size, eos, bounds)
        with self._lock:
            found = self._kept.get(key) or self._read(path, vocab_size, eos, bounds)
            self._kept[key] = found
            self._kept.move_to_end(key)
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        return found

    def _read(
        self, path: Path, vocab_size: int, eos: tuple[int, ...], bounds: Bounds
    ) -> tuple[LLTokenizer, Vocabulary]:
        from llguidance import LLTokenizer

        text = path.read_text(encoding="utf-8")
        tokenizer = LLTokenizer(text, n_vocab=vocab_size, eos_token=list(eos))
        return tokenizer, Vocabulary.read(json.loads(text)["model"], bounds)


_READ = ReadTokenizers(most=4)
"""A process has one: its models come and go."""


class CompiledGrammar:
    """Implements `core.plan.Constraint`."""

    def __init__(
        self,
        prototype: LLMatcher,
        eos: frozenset[int],
        param: str,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self._prototype = prototype
        self._eos = eos
        self._param = param
        self._vocabulary = vocabulary

    def matcher(self, output: Sequence[int]) -> GrammarMatcher:
        runs = None if self._vocabulary is None else Runs(self._vocabulary)
        matcher = GrammarMatcher(self._prototype.deep_copy(), self._eos, self._param, runs)
        for token_id in output:
            matcher.accept(token_id)
        return matcher


class GrammarMatcher:
    """Implements `core.plan.Matcher`."""

    def __init__(
        self, matcher: LLMatcher, eos: frozenset[int], param: str, runs: Runs | None
    ) -> None:
        self._matcher = matcher
        self._eos = eos
        self._param = param
        self._runs = runs
        self._accepted: list[int] = []
        """Not yet told to the matcher."""
        self._next: bytes | None = None
        """The mask, once it is computed."""
        self._error: MLXServingError | None = None
        self._ended = False

    def accept(self, token_id: int) -> None:
        self._next = None
        self._ended = self._ended or token_id in self._eos
        self._accepted.append(token_id)
        if self._runs is not None:
            self._runs.accept(token_id)

    def forced(self, most: int) -> list[int]:
        run: list[int] = []
        while len(run) < most and (token_id := self._only()) is not None:
            self.accept(token_id)
            run.append(token_id)
        return run

    def mask(self) -> bytes | None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        if self._next is None and not self._ended:
            self._next = self._compute()
        return self._next

    def _only(self) -> int | None:
        """The one token that may come next; None: there are several, or none that could be known."""
        try:
            mask = self.mask()
        except MLXServingError as error:
            # Of the token after the run: whoever asks for its mask hears of it.
            self._error = error
            return None
        return None if mask is None else only_bit(mask)

    def _compute(self) -> bytes:
        if self._accepted:
            self._matcher.consume_tokens(self._accepted)
            self._accepted.clear()
        bits = b"" if self._matcher.is_error() else self._matcher.compute_bitmask()
        if self._matcher.is_error():
            self._ended = True
            raise InvalidRequest(
                f"'{self._param}' cannot be followed any further: {_reason(self._matcher)}",
                param=self._param,
            )
        return bits if self._runs is None else self._runs.bounded(bits)


def only_bit(mask: bytes) -> int | None:
    """The number of the one bit that is set; None: none or several are."""
    if mask.count(0) != len(mask) - 1:
        return None
    ((at, byte),) = [(at, byte) for at, byte in enumerate(mask) if byte]
    return None if byte & (byte - 1) else 8 * at + byte.bit_length() - 1


def _definition(grammar: Grammar) -> str:
    """What llguidance reads. Raises ValueError."""
    answer = _answer(grammar)
    if not grammar.before:
        return answer
    body = {"lark_grammar": answer} if grammar.kind == "lark" else json.loads(answer)["grammars"][0]
    start = {"lark_grammar": f"start: before @answer\n{grammar.before}"}
    return json.dumps({"grammars": [start, {**body, "name": "answer"}]})


def _answer(grammar: Grammar) -> str:
    from llguidance import LLMatcher, regex_to_lark

    match grammar.kind:
        case "json_object":
            return _json({"type": "object"}, grammar.white_space)
        case "json_schema":
            schema = json.loads(grammar.text)
            if isinstance(schema, bool):
                # Options are applied to an object; these two mean what the booleans mean.
                schema = {} if schema else {"enum": []}
            return _json(schema, grammar.white_space)
        case "regex":
            # As in JSON schema, \d and \w mean ASCII, not every script's digits and letters.
            return LLMatcher.grammar_from_regex(regex_to_lark(grammar.text, use_ascii="dw"))
        case "choice":
            choices = "|".join(_literal(choice) for choice in json.loads(grammar.text))
            return LLMatcher.grammar_from_regex(choices)
        case "lark":
            return LLMatcher.grammar_from_lark(grammar.text)


def _limits() -> LLParserLimits:
    """What compiling and one mask may take: tens of milliseconds."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_items_in_row=2_000,
        max_lexer_states=50_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )


def _json(schema: dict[str, Any], white_space: str | None) -> str:
    from llguidance import LLMatcher

    spaces = {"whitespace_flexible": bool(white_space), "whitespace_pattern": white_space or None}
    options: Any = _JSON_OPTIONS | spaces
    return LLMatcher.grammar_from_json_schema(schema, overrides=options)


def _literal(text: str) -> str:
    """An expression that matches the text and nothing else."""
    return "".join(f"\\{c}" if c in r"\.+*?()|[]{}^$#&-~" else c for c in text)


def _reason(matcher: LLMatcher) -> str:
    error = " ".join(matcher.get_error().split())
    return "nothing can satisfy it" if error.startswith("NoExt") else error[:MAX_ERROR_CHARS]
