"""A runner that computes nothing: for tests and for measuring everything around a model.

The loader chooses it for a folder whose `config.json` says `"model_type": "scripted"`; MLX is never
imported. Keys of that file, all optional but the first:

    model_type               "scripted"
    vocab_size               default 256
    max_position_embeddings  the context length, default 8192
    eos_token_id             an integer or a list
    kind                     decoder, embedder or reranker; default decoder
    embedding_size           numbers of a vector, a function of the whole text; default 8
    script:
      mode           "hash"   each token is a function of the tokens before it (and of seed and choice
                              where the temperature is not 0); never an end-of-sequence token
                     "echo"   the prompt's tokens again, then end of sequence
                     "text"   `token_ids`, then end of sequence
                     "cycle"  `token_ids` over and over
                     Where a request's grammar forbids a token, one that it allows comes instead.
                     An adapter is a salt of the hash.
      token_ids      for "text" and "cycle"
      step_delay_ms  a step's tokens are there this long after its launch
      logprob        the log-probability of every token, default -0.5
      kv_bytes_per_token  counted where memory_budget is in bytes; default 8
      load_slices    loading it takes so many slices of `load_slice_ms`
      die_on_load    loading it ends the process (SIGABRT)
      die_on         a prompt with this token ends the process (SIGABRT), as an accelerator fault does
      hang_on        a step that starts a prompt with this token never ends
      fail_on        launching a step that starts a prompt with this token raises RuntimeError
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from mlx_serving.adapter_folder import CONFIG_FILE, BadAdapter, read_settings
from mlx_serving.clock import monotonic
from mlx_serving.errors import MLXServingError, ModelBroken
from mlx_serving.runtime.backend.grammar import Grammars, tokenizer_file
from mlx_serving.runtime.backend.identity import adapter_identity
from mlx_serving.runtime.backend.model import LoadedAdapter, LoadedModel, adapter_info
from mlx_serving.runtime.backend.runaway import Bounds
from mlx_serving.runtime.core.plan import (
    MAX_DEPTH,
    MAX_FORCED,
    DecodeRow,
    Forced,
    Limits,
    Matcher,
    PrefillChunk,
    Publish,
    RowStart,
    Sampled,
    StepPlan,
    StepResult,
)
from mlx_serving.runtime.slices import Slices
from mlx_serving.types import ModelInfo, ModelKind, SamplingParams, TokenLogprob
from mlx_serving.worker.wire import Memory, ModelOptions

_MASK64 = (1 << 64) - 1
_PREFILL_STEP = 512
_KV_BUCKET = 256
PREFIX_BLOCK = 16
_PREFIX_BLOCKS = 1024


class Script(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    mode: Literal["hash", "echo", "text", "cycle"] = "hash"
    token_ids: tuple[int, ...] = ()
    step_delay_ms: float = 0.0
    logprob: float = -0.5
    die_on_load: bool = False
    kv_bytes_per_token: int = 8
    load_slices: int = 1
    load_slice_ms: float = 0.0
    die_on: int | None = None
    hang_on: int | None = None
    fail_on: int | None = None


class ScriptedConfig(msgspec.Struct, frozen=True):
    model_type: Literal["scripted"] = "scripted"
    vocab_size: int = 256
    kind: ModelKind = "decoder"
    embedding_size: int = 8
    max_position_embeddings: int = 8192
    eos_token_id: int | tuple[int, ...] = ()
    script: Script = Script()

    @property
    def eos(self) -> tuple[int, ...]:
        ids = self.eos_token_id
        return (ids,) if isinstance(ids, int) else ids


@dataclass(slots=True)
class _Row:
    """A sequence in progress: what of it was computed, and what the next token depends on."""

    params: SamplingParams
    prompt: tuple[int, ...]
    hash: int
    matcher: Matcher | None
    length: int = 0
    """Tokens computed."""
    last: int | None = None
    tokens: list[int] = field(default_factory=list)
    """Those computed."""
    foreseeable: bool = False

    @property
    def outputs(self) -> int:
        return self.length - len(self.prompt)

    def feed(self, token: int) -> None:
        self.hash = _mix(self.hash ^ (token + 1))
        self.length += 1
        self.tokens.append(token)


class ScriptedStep:
    def __init__(self, result: StepResult, due: float, hangs: bool) -> None:
        self._result = result
        self._due = due
        self._hangs = hangs

    def wait(self) -> StepResult:
        rest = self._due - monotonic()
        if self._hangs:
            threading.Event().wait()
        elif rest > 0:
            threading.Event().wait(rest)
        return self._result


class ScriptedRunner:
    """Implements `core.plan.Runner`. `die` replaces the way out of the process, in its own tests.
    `foresight`: what a grammar forces is told before it is sampled."""

    def __init__(
        self,
        config: ScriptedConfig,
        die: Callable[[], None] = os.abort,
        *,
        foresight: bool = True,
    ) -> None:
        self._config = config
        self._script = config.script
        self._die = die
        self._rows: dict[int, _Row] = {}
        self._blocks: dict[int, list[int]] = {}
        """Each prefix block's tokens."""
        self._free_at = 0.0
        self._foresight = foresight
        self._foreseen: list[Forced] = []

    def launch(self, plan: StepPlan) -> ScriptedStep:
        if plan.keep_blocks is not None:
            self._blocks = {i: self._blocks[old] for i, old in enumerate(plan.keep_blocks)}
        for row in plan.frees:
            self._rows.pop(row, None)
        for source, target in plan.moves:
            self._rows[target] = self._rows.pop(source)
        hangs = max(map(self._start, plan.starts), default=False)
        sampled = [s for chunk in plan.prefill if (s := self._prefill(chunk)) is not None]
        sampled += [self._decode(row) for row in plan.decode]
        for publish in plan.publish:
            self._publish(publish)
        self._free_at = max(self._free_at, monotonic()) + self._script.step_delay_ms / 1000
        return ScriptedStep(StepResult(plan.step_id, sampled), self._free_at, hangs)

    def foresee(self) -> list[Forced]:
        told, self._foreseen = self._foreseen, []
        return told

    def reset(self) -> None:
        self._foreseen.clear()
        self._rows.clear()
        self._blocks.clear()

    def _start(self, start: RowStart) -> bool:
        """Returns whether the step hangs."""
        tokens, params = start.token_ids, start.sampling
        prompt, output = tokens[: start.prompt_len], tokens[start.prompt_len :]
        if self._script.die_on in prompt:
            self._die()
        if self._script.fail_on in prompt:
            raise RuntimeError(f"scripted failure on token {self._script.fail_on}")
        salt = _mix(params.seed ^ _mix(params.choice)) if params.temperature > 0 else 0
        if start.adapter is not None:
            salt ^= _mix(int(start.adapter.rpartition("@")[2], 16))
        matcher = None if start.constraint is None else start.constraint.matcher(output)
        row = self._rows[start.row] = _Row(params, prompt, salt, matcher)
        row.foreseeable = self._foresight and start.foreseeable
        for block in start.blocks:
            for token in self._blocks[block]:
                row.feed(token)
        assert row.tokens == list(tokens[: start.reused]), "blocks hold another prefix"
        return self._script.hang_on in prompt

    def _publish(self, publish: Publish) -> None:
        row = self._rows[publish.row]
        assert publish.start + len(publish.blocks) * PREFIX_BLOCK <= row.length, publish
        for i, block in enumerate(publish.blocks):
            start = publish.start + i * PREFIX_BLOCK
            self._blocks[block] = row.tokens[start : start + PREFIX_BLOCK]

    def _prefill(self, chunk: PrefillChunk) -> Sampled | None:
        row = self._rows[chunk.row]
        assert row.length == chunk.start, (row.length, chunk)
        for token in chunk.token_ids:
            row.feed(token)
        if not chunk.samples:
            return None
        return self._vector(row, chunk.seq_id) if chunk.pooled else self._sample(row, chunk.seq_id)

    def _vector(self, row: _Row, seq_id: int) -> Sampled:
        """Of numbers from -1 to 1, which depend on the whole text."""
        size = 1 if self._config.kind == "reranker" else self._config.embedding_size
        numbers = [_mix(row.hash + i) / 2**63 - 1 for i in range(size)]
        return Sampled(seq_id, [], vector=struct.pack(f"<{size}f", *numbers))

    def _decode(self, decode: DecodeRow) -> Sampled:
        row = self._rows[decode.row]
        assert row.length == decode.position, (row.length, decode)
        token = row.last if decode.token_id is None else decode.token_id
        assert token is not None, decode
        for one in (token, *decode.forced):
            row.feed(one)
        return self._sample(row, decode.seq_id)

    def _sample(self, row: _Row, seq_id: int) -> Sampled:
        try:
            token = row.last = self._follow(row, self._next(row))
        except MLXServingError as error:
            row.last = 0
            return Sampled(seq_id, [0], error=error)
        k = row.params.logprobs
        if row.foreseeable and row.matcher is not None:
            self._foresee(row, seq_id, token, row.matcher)
        if k is None:
            return Sampled(seq_id, [token])
        ids = tuple((token + i) % self._config.vocab_size for i in range(k))
        values = tuple(self._script.logprob - i for i in range(k))
        return Sampled(seq_id, [token], [TokenLogprob(self._script.logprob, ids, values)])

    def _foresee(self, row: _Row, seq_id: int, sampled: int, matcher: Matcher) -> None:
        run = matcher.forced(MAX_FORCED - 1)
        if run:
            # The host may not know the tokens of the steps in flight yet.
            start = max(row.length - MAX_DEPTH, len(row.prompt))
            self._foreseen.append(
                Forced(seq_id, start, (*row.tokens[start:], sampled, *run)),
            )

    def _follow(self, row: _Row, token: int) -> int:
        """The token, or where the row's grammar does not allow it, one that the row's hash picks."""
        if row.matcher is None:
            return token
        mask = row.matcher.mask()
        if mask is not None and not mask[token >> 3] >> (token & 7) & 1:
            allowed = [t for t in range(self._config.vocab_size) if mask[t >> 3] >> (t & 7) & 1]
            token = allowed[row.hash % len(allowed)]
        row.matcher.accept(token)
        return token

    def _next(self, row: _Row) -> int:
        script, index = self._script, row.outputs
        if script.mode == "hash":
            return self._not_eos(row.hash)
        if script.mode == "cycle" and script.token_ids:
            return script.token_ids[index % len(script.token_ids)]
        text = row.prompt if script.mode == "echo" else script.token_ids
        if index < len(text):
            return text[index]
        if self._config.eos and index >= row.params.min_tokens:
            return self._config.eos[0]
        return self._not_eos(row.hash)

    def _not_eos(self, hash_: int) -> int:
        token = hash_ % self._config.vocab_size
        while token in self._config.eos:
            token = (token + 1) % self._config.vocab_size
        return token


def load(
    model_id: str, path: Path, config: dict[str, Any], options: ModelOptions
) -> Slices[LoadedModel]:
    """Raises ModelBroken on a wrong key or value in `config.json`."""
    try:
        parsed = msgspec.convert(config, ScriptedConfig)
    except msgspec.ValidationError as e:
        raise ModelBroken(f"{path / 'config.json'}: {e}") from e
    if parsed.script.die_on_load:
        os.abort()
    for _ in range(parsed.script.load_slices):
        threading.Event().wait(parsed.script.load_slice_ms / 1000)
        yield
    if len(set(parsed.eos)) >= parsed.vocab_size:
        raise ModelBroken(f"{path / 'config.json'}: every token ends the sequence")
    context = min(parsed.max_position_embeddings, options.context_length or 1 << 30)
    info = ModelInfo(
        model_id=model_id,
        path=str(path),
        architecture="scripted",
        context_length=context,
        vocab_size=parsed.vocab_size,
        eos_token_ids=parsed.eos,
        weight_bytes=(weight_bytes := _weight_bytes(path)),
        held_bytes=weight_bytes,
        kernels="none",
        prefix_reuse="none" if options.prefix_cache_bytes == 0 else "blocks",
        kind=parsed.kind,
        embedding_size=0 if parsed.kind == "reranker" else parsed.embedding_size,
        max_input_tokens=context - 1,
        prefill_step_size=options.prefill_step_size or _PREFILL_STEP,
        max_num_seqs=options.max_num_seqs if parsed.kind == "decoder" else 0,
    )
    budget = options.memory_budget
    device = ScriptedMemory(int(budget)) if budget and budget > 1 else None
    row_tokens = -(-context // _KV_BUCKET) * _KV_BUCKET
    limits = Limits(
        max_num_seqs=options.max_num_seqs,
        prefill_step_size=options.prefill_step_size or _PREFILL_STEP,
        context_length=context,
        kv_capacity_tokens=_kv_tokens(parsed, options, info.held_bytes, row_tokens),
        kv_bytes_per_token=parsed.script.kv_bytes_per_token if device else 0,
        prefix_block_bytes=PREFIX_BLOCK * parsed.script.kv_bytes_per_token,
        kv_bucket_tokens=_KV_BUCKET,
        eos_token_ids=parsed.eos,
        prefix_blocks=_prefix_blocks(options.prefix_cache_bytes),
        prefix_block_tokens=PREFIX_BLOCK,
    )
    bounds = Bounds.of(options)
    grammars = Grammars(tokenizer_file(path, options), parsed.vocab_size, parsed.eos, bounds)
    adapters = ScriptedAdapters() if parsed.kind == "decoder" else None
    runner = ScriptedRunner(parsed, foresight=options.jump_forward != "off")
    return LoadedModel(info, runner, limits, grammars, device=device, adapters=adapters)


class ScriptedAdapters:
    """Of files that are never read. Implements `model.AdapterHost`."""

    def load(self, model_id: str, path: Path, base: ModelInfo) -> Slices[LoadedAdapter]:
        try:
            weights = path / read_settings(path).file
        except BadAdapter as bad:
            raise ModelBroken(f"the adapter in {path} cannot be loaded: {bad}") from bad
        info = adapter_info(base, model_id, path, weights.stat().st_size)
        yield
        return LoadedAdapter(info, f"{model_id}@{adapter_identity(weights, path / CONFIG_FILE)}")

    def unload(self, tag: str) -> None:
        pass


class ScriptedMemory:
    """A device of which nothing is ever used. Implements `model.Device`."""

    def __init__(self, budget_bytes: int) -> None:
        self.usable_bytes = budget_bytes

    def use(self) -> Memory:
        return Memory(budget_bytes=self.usable_bytes)

    def give_back(self) -> None:
        pass


def _kv_tokens(
    config: ScriptedConfig, options: ModelOptions, held_bytes: int, row_tokens: int
) -> int:
    """All that the rows can use or, of a budget in bytes, what the weights leave."""
    most = options.max_num_seqs * row_tokens
    if not options.memory_budget or options.memory_budget <= 1:
        return most
    room = int(options.memory_budget) - held_bytes
    return max(_KV_BUCKET, min(most, room // config.script.kv_bytes_per_token))


def _weight_bytes(path: Path) -> int:
    """As if they were read."""
    return sum(file.stat().st_size for file in path.glob("model*.safetensors"))


def _prefix_blocks(cache_bytes: int | None) -> int:
    """As if a token's KV took 8 bytes."""
    return _PREFIX_BLOCKS if cache_bytes is None else cache_bytes // (8 * PREFIX_BLOCK)


def _mix(x: int) -> int:
    """splitmix64's finaliser."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)
