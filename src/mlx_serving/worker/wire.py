"""What the gateway process and a worker process say to each other.

Frames on a Unix stream socket: 4 bytes little-endian length, then one MessagePack-encoded
message, told apart by its tag. Both ends are the same version of this package (the
supervisor starts the worker), so fields may change freely between releases.

    to the worker      LoadModel  UnloadModel  Tune  Pin  Turns  ClearCache  Submit  Cancel  Pause  Resume
                       Shutdown
    from the worker    Hello  Phase  ModelLoaded  ModelFailed  ModelUnloaded  Wired  Memory  Short
                       CacheCleared  Started  Step

One `Step` frame a step carries the new tokens of every sequence.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from mlx_serving.types import (
    NO_TURN,
    CacheStats,
    FinishReason,
    Grammar,
    JumpForward,
    KVBits,
    ModelInfo,
    Prepared,
    Priority,
    SamplingParams,
    TokenLogprob,
    Turn,
)

MAX_FRAME_BYTES = 256 * 1024 * 1024
HEADER_BYTES = 4


class ModelOptions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a model runs in the worker; the subset of the configuration that the runtime needs."""

    max_num_seqs: int = 16
    """Rows that decode at once."""
    prefill_step_size: int | None = None
    """Largest prefill chunk in tokens, cut at multiples of it from the prompt's start; None: what
    suits the device and its kernels."""
    max_itl_ms: float = 0.0
    """The gap between tokens that prefill should not make longer for running streams; 0: no target."""
    pipeline_depth: int = 2
    """Steps in flight: 1 waits for each step's tokens before it plans the next."""
    context_length: int | None = None
    """Overrides the model's own, downwards."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    kernels: Literal["auto", "exact", "fast", "f32", "off"] = "auto"
    """CPU backend only: which native kernels replace MLX's own; `off` is stock MLX."""
    exact_batch: bool = False
    """Always decode with `max_num_seqs` rows, so that logits are bit-equal whatever the batch."""
    tokenizer_path: str | None = None
    """Folder of tokenizer.json, where it is not the model's."""
    max_wait_s: float = math.inf
    """A sequence that has waited so long for a row goes before every class; inf: never."""
    short_jobs_first: bool = False
    kv_bits: KVBits = "off"
    """How attention layers keep keys and values."""
    prefix_cache_bytes: int | None = None
    """Memory for prefix blocks; 0: none are kept; None: a share of what KV may take."""
    jump_forward: JumpForward = "auto"
    """Whether tokens that a grammar forces are computed several at once."""
    json_digit_tokens: int = 40
    json_string_tokens: int = 16_384
    json_white_space: int = 20
    kv_disk_path: str | None = None
    """Folder in which prefix blocks are kept for later workers; None: nowhere."""
    kv_disk_bytes: int = 0
    """What that folder may hold."""
    slow_step_ms: float = 0.0
    """A fault, for tests and rehearsals: each step is put off by so long."""
    unprepared: tuple[Prepared, ...] = ()
    """For measurements: its prompts' blocks are hashed, its grammars compiled in the loop and not before."""
    memory_budget: float | None = None
    """What all models of the worker together may take: `Config.memory_budget`."""
    adapter_of: str | None = None
    """The folder holds an adapter of this loaded model, and it runs as that one does; no other option
    counts."""


class LoadModel(msgspec.Struct, frozen=True, tag="load"):
    model_id: str
    path: str
    options: ModelOptions


class UnloadModel(msgspec.Struct, frozen=True, tag="unload"):
    model_id: str


class Tune(msgspec.Struct, frozen=True, tag="tune", kw_only=True):
    """How much a loaded model takes on at once, from its next step on. At most what it was loaded
    with, which None means. Nothing that runs is dropped: who has a row keeps it to its end."""

    model_id: str
    max_num_seqs: int | None = None
    """Sequences that have a row."""
    prefill_tokens: int | None = None
    """Prefill in a step. Where results depend on where prompts are cut, chunks stay as they are, and
    one a step remains."""


class Pin(msgspec.Struct, frozen=True, tag="pin", kw_only=True):
    """Whether a loaded model's weights are to stay in physical memory; answered by Wired."""

    model_id: str
    pinned: bool = False


class Turns(msgspec.Struct, frozen=True, tag="turns", kw_only=True):
    """Whose turn it is among a model's sequences, those that wait included. None: as it was loaded."""

    model_id: str
    max_wait_s: float | None = None
    short_jobs_first: bool | None = None


Order = Tune | Pin | Turns
"""How a model is run from now on; the defaults take an earlier order back."""


class ClearCache(msgspec.Struct, frozen=True, tag="clear_cache"):
    """Forget every prefix that no running sequence uses, on disk too."""

    model_id: str


class Submit(msgspec.Struct, frozen=True, tag="submit", kw_only=True):
    """Start (or resume) one sequence.

    `token_ids` is the prompt and, on resumption, what was already generated:
    `prompt_len` says where the prompt ends. `seq_id` is unique for the connection.
    """

    seq_id: int
    model_id: str
    token_ids: list[int]
    prompt_len: int
    sampling: SamplingParams
    priority: Priority = Priority.NORMAL
    grammar: Grammar | None = None
    cache_salt: str | None = None
    """Cached prefixes are shared only between sequences of equal salts."""
    pooled: bool = False
    """It ends with its prompt, and its only row has a vector. Always so in a model that is no decoder."""
    turn: Turn = NO_TURN
    second_at: int | None = None
    """Of a pair of texts: where the second one begins, for models that tell them apart."""


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    seq_id: int


class Pause(msgspec.Struct, frozen=True, tag="pause"):
    """The sequence's reader is slow: compute nothing for it. It keeps its row until another needs it."""

    seq_id: int


class Resume(msgspec.Struct, frozen=True, tag="resume"):
    seq_id: int


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """Leave now; running sequences are dropped (draining is the gateway's business)."""


ToWorker = (
    LoadModel | UnloadModel | Order | ClearCache | Submit | Cancel | Pause | Resume | Shutdown
)


class Hello(msgspec.Struct, frozen=True, tag="hello", kw_only=True):
    """The first frame: the worker reads what it is sent. A new process has neither models nor sequences."""

    models: tuple[str, ...] = ()
    """Loaded already when the connection was made."""
    sequences: tuple[int, ...] = ()
    """Running then."""


class Phase(msgspec.Struct, frozen=True, tag="phase"):
    """What the worker is doing, for health and its watchdog; sent on each change, and repeated: every
    second, by a thread of its own, while it computes or loads, every few seconds while idle."""

    phase: Literal["idle", "loading", "compiling", "stepping"]
    detail: str = ""
    elapsed_s: float = 0.0
    """Since the phase began."""
    rss_bytes: int = 0
    """The process's resident set, when it is repeated; 0: not looked at."""


class ModelLoaded(msgspec.Struct, frozen=True, tag="loaded"):
    info: ModelInfo


class ModelFailed(msgspec.Struct, frozen=True, tag="failed"):
    model_id: str
    code: str
    message: str


class ModelUnloaded(msgspec.Struct, frozen=True, tag="unloaded"):
    model_id: str


class Wired(msgspec.Struct, frozen=True, tag="wired"):
    """What of a model's weights cannot be paged out."""

    model_id: str
    bytes: int = 0
    why_not: str | None = None
    """Why nothing is, although it is pinned."""


class CacheCleared(msgspec.Struct, frozen=True, tag="cache_cleared"):
    model_id: str
    stats: CacheStats
    """After it; a model that is not loaded has none."""


class Memory(msgspec.Struct, frozen=True, tag="memory", kw_only=True):
    """What the worker holds, in bytes; told when a model has come or gone."""

    budget_bytes: int
    """For all models: weights, KV, prefixes."""
    active_bytes: int = 0
    """Arrays, by MLX's allocator, and the most that they ever were."""
    peak_bytes: int = 0
    cache_bytes: int = 0
    """Freed, and kept by the allocator."""
    rss_bytes: int = 0
    """The process's resident set."""

    def kinds(self) -> dict[str, int]:
        """For a metric with a label."""
        fields = self.__struct_fields__
        return {name.removesuffix("_bytes"): getattr(self, name) for name in fields}


class Short(msgspec.Struct, frozen=True, tag="short"):
    """A sequence waits for so many bytes more than there are, and none is held for others: idle
    models have to leave."""

    bytes: int


class TokenRow(msgspec.Struct, frozen=True, array_like=True):
    """One sequence's share of a step. Tokens past the one that finished it are never sent."""

    seq_id: int
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: tuple[str, str] | None = None
    """(code, message) when `finish_reason` is "error"."""
    cached_tokens: int = 0
    """Prompt tokens that were not computed but found in a cache; set with the first token."""
    error_param: str | None = None
    """The field at fault, where `error` is about one."""
    vector: bytes | None = None
    """Of a pooled sequence: float32, little-endian."""
    cache_write_tokens: int = 0
    """Prompt tokens that were computed and left in a cache; set with the first token."""


Stage = Literal["grammar", "hash", "queue", "disk", "prefill"]
"""hash: of the prompt's blocks. queue: until it has a row; grammar: of that, until it is compiled; disk: of
that, what reading its prefix from disk took when it could have had one. prefill: from there to the first token."""
StageTime = tuple[Stage, float]
"""With milliseconds."""


class StepStats(msgspec.Struct, frozen=True, array_like=True):
    """What one step did, for metrics. Durations in milliseconds."""

    model_id: str
    decode_rows: int = 0
    prefill_tokens: int = 0
    running: int = 0
    waiting: int = 0
    step_ms: float = 0.0
    kv_tokens: int = 0
    """Tokens of KV capacity that rows hold at this moment."""
    kv_capacity_tokens: int = 0
    cache: CacheStats | None = None
    """None: as it was."""
    own_ms: float = 0.0
    """What of `step_ms` the device spent on this step, and not on other models' steps."""
    forced_tokens: int = 0
    """Computed beside others of their sequence, since a grammar left no choice."""
    stages: list[StageTime] = []
    """Of sequences' ways to their first tokens, since the step before."""
    lacks_memory: bool = False
    """A sequence waits for nothing but KV memory."""


class Started(msgspec.Struct, frozen=True, tag="started"):
    """These sequences take a row in a step that is about to be computed: who begins when the worker
    dies is a suspect (`worker.blame`)."""

    seq_ids: list[int]


class Step(msgspec.Struct, frozen=True, tag="step"):
    rows: list[TokenRow]
    stats: StepStats | None = None
    """None: rows that tell of errors between steps (a refusal, an unloaded model)."""


FromWorker = (
    Hello
    | Phase
    | ModelLoaded
    | ModelFailed
    | ModelUnloaded
    | Wired
    | Memory
    | Short
    | CacheCleared
    | Started
    | Step
)

_encoder = msgspec.msgpack.Encoder()
_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
_from_worker: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)


def encode(message: ToWorker | FromWorker) -> bytearray:
    """One frame: header and body."""
    frame = bytearray(HEADER_BYTES)
    _encoder.encode_into(message, frame, HEADER_BYTES)
    frame[:HEADER_BYTES] = (len(frame) - HEADER_BYTES).to_bytes(HEADER_BYTES, "little")
    return frame


def decode_to_worker(body: bytes | bytearray | memoryview) -> ToWorker:
    """Raises msgspec.DecodeError on a malformed body."""
    return _to_worker.decode(body)


def decode_from_worker(body: bytes | bytearray | memoryview) -> FromWorker:
    """Raises msgspec.DecodeError on a malformed body."""
    return _from_worker.decode(body)


class FrameSplitter:
    """Cuts a byte stream into frame bodies. Raises ValueError on a length over MAX_FRAME_BYTES."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        self._buffer += data
        bodies: list[bytes] = []
        start = 0
        while len(self._buffer) - start >= HEADER_BYTES:
            length = int.from_bytes(self._buffer[start : start + HEADER_BYTES], "little")
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"frame of {length} bytes exceeds {MAX_FRAME_BYTES}")
            end = start + HEADER_BYTES + length
            if len(self._buffer) < end:
                break
            bodies.append(bytes(memoryview(self._buffer)[start + HEADER_BYTES : end]))
            start = end
        if start:
            del self._buffer[:start]
        return bodies
