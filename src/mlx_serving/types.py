"""The shapes a request has on its way, shared by every part.

    wire body ─▶ GenerateRequest (frozen, valid by construction) ─▶ worker.wire.Submit
    worker.wire.TokenRow ─▶ TokenEvent ─▶ text ─▶ SSE

A `GenerateRequest` whose existence proves that its fields are in range. What depends on
the model (context length, vocabulary) is checked by the gateway once the prompt has
been tokenised, before any work is done.
"""

from __future__ import annotations

import enum
import math
from array import array
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from mlx_serving.errors import InvalidRequest

PrefixReuse = Literal["blocks", "snapshots", "none"]
ModelKind = Literal["decoder", "embedder", "reranker"]
"""What a model is for: text, vectors (which a decoder gives too), or the relevance of pairs."""
RankForm = Literal["", "qwen3", "bge-gemma"]
"""How a reranker that is a language model is asked; "" for every other model."""
FinishReason = Literal["stop", "length", "tool_calls", "cancelled", "error"]
Caching = Literal["use", "refresh", "none"]
"""Of whole answers: use what others computed; compute, and let later ones use it; neither."""

MAX_LOGPROBS = 20
"""Top log-probabilities a token may ask for, as OpenAI bounds it."""
MAX_PENALTY_WINDOW = 32_768
MAX_CHOICES = 64
MAX_STOPS = 64
MAX_STOP_CHARS = 1024
MAX_INPUTS = 2048
"""Texts in one request for vectors, as OpenAI bounds it."""
MAX_WEIGHT = 1000
MAX_TIMEOUT_S = 86_400


def _require(ok: bool, param: str, must: str, value: object) -> None:
    if not ok:
        raise InvalidRequest(f"'{param}' must be {must}, got {value!r}.", param=param)


class Priority(enum.IntEnum):
    """Scheduling class; a lower number is served sooner."""

    CRITICAL = 0
    HIGH = 1
    NORMAL = 2
    LOW = 3


class Turn(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What decides when a sequence is served, besides its class; it cannot change its tokens.

    Times are of the monotonic clock, which the processes of one machine share.
    """

    arrived_s: float | None = None
    client: str | None = None
    """Clients share what there is, by weight: the name of an API key."""
    weight: float = 1.0
    expected_tokens: int | None = None
    """Length of the answer, where it is bounded."""
    deadline_s: float | None = None
    """It is not begun if it cannot end by then."""


NO_TURN = Turn()


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """How one sequence's tokens are chosen. Crosses the worker's wire as it is.

    The order of operations, vectorised over a batch: logits → logit bias → repetition,
    presence and frequency penalties → temperature → top-k → top-p → min-p → a draw keyed by
    (seed, choice, position). Log-probabilities are the model's own: of the raw logits,
    before any of these.
    """

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens seen in prompt or output; 1 is off."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of each token seen in the output."""
    frequency_penalty: float = 0.0
    """Subtracted once per occurrence in the output."""
    penalty_window: int | None = None
    """Of prompt and output, the last tokens that the three penalties look at; None: all."""
    logit_bias: dict[int, float] = {}
    seed: int = 0
    """64 bits; drawn by the gateway at admission where the client gave none."""
    choice: int = 0
    """Index among the request's `n` answers; keys the random numbers with the seed."""
    logprobs: int | None = None
    """None: not wanted; k ≥ 0: the chosen token's and the k most likely tokens'."""
    max_tokens: int = 16
    min_tokens: int = 0
    """End-of-sequence and stop tokens cannot be sampled before this many tokens."""
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Raises InvalidRequest naming the first field that is out of its range."""
        r = _require
        r(0 <= self.temperature <= 2, "temperature", "from 0 to 2", self.temperature)
        r(0 < self.top_p <= 1, "top_p", "above 0 and at most 1", self.top_p)
        r(self.top_k >= 0, "top_k", "at least 0 (0: off)", self.top_k)
        r(0 <= self.min_p <= 1, "min_p", "from 0 to 1", self.min_p)
        repetition = self.repetition_penalty
        r(0 < repetition <= 100, "repetition_penalty", "above 0 and at most 100", repetition)
        r(
            -2 <= self.presence_penalty <= 2,
            "presence_penalty",
            "from -2 to 2",
            self.presence_penalty,
        )
        frequency = self.frequency_penalty
        r(-2 <= frequency <= 2, "frequency_penalty", "from -2 to 2", frequency)
        if self.penalty_window is not None:
            limit = MAX_PENALTY_WINDOW
            ok = 1 <= self.penalty_window <= limit
            r(ok, "penalty_window", f"from 1 to {limit}", self.penalty_window)
        for token_id, bias in self.logit_bias.items():
            param = f"logit_bias.{token_id}"
            r(math.isfinite(bias) and -100 <= bias <= 100, param, "from -100 to 100", bias)
        r(-(2**63) <= self.seed < 2**64, "seed", "an integer of 64 bits", self.seed)
        if self.logprobs is not None:
            r(
                0 <= self.logprobs <= MAX_LOGPROBS,
                "logprobs",
                f"from 0 to {MAX_LOGPROBS}",
                self.logprobs,
            )
        r(self.max_tokens >= 1, "max_tokens", "at least 1", self.max_tokens)
        r(self.min_tokens >= 0, "min_tokens", "at least 0", self.min_tokens)


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """One chat turn as the chat template sees it. `content` is text (parts already joined)."""

    role: str
    content: str | None = None
    name: str | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class ChatPrompt(msgspec.Struct, frozen=True, kw_only=True, tag="chat"):
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    template_kwargs: Mapping[str, Any] = {}
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tool_choice: str = "auto"
    """`auto`, `required` (at least one call), or `=NAME`: calls of that function only. A request that
    wants none has no `tools`."""
    strict_tools: tuple[str, ...] = ()
    """Functions whose arguments must keep to their schemas whenever they are called."""
    parallel_tool_calls: bool = True
    """False: one call at most, and the answer ends with it."""
    reasoning_effort: str | None = None
    """For the chat template; refused when it has no place for it."""
    thinks: bool = False
    """Refused when the model cannot think."""


class TextPrompt(msgspec.Struct, frozen=True, kw_only=True, tag="text"):
    text: str
    add_special_tokens: bool = True


class TokenPrompt(msgspec.Struct, frozen=True, kw_only=True, tag="tokens"):
    token_ids: tuple[int, ...]


Prompt = ChatPrompt | TextPrompt | TokenPrompt


class Grammar(msgspec.Struct, frozen=True, kw_only=True):
    """What the output must look like. Validated and bounded when the request is parsed; compiled in
    the worker, next to the vocabulary."""

    kind: Literal["json_schema", "json_object", "regex", "choice", "lark"]
    text: str = ""
    """The schema as JSON, the expression, a JSON list of choices, or the grammar; "" for json_object."""
    param: str = "response_format"
    """The field that the client set, for errors."""
    white_space: str | None = None
    """Of JSON: what may stand between two of its tokens, an expression; "": nothing; None: the
    worker's own bound."""
    before: str = ""
    """Lark rules, `before` among them, for what precedes it: a model's reasoning. Set by the gateway."""


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt and how to continue it; `n` answers come from n sequences.

    `max_tokens` None means as many as the context allows (or the server's default). The gateway
    sets `sampling`'s `max_tokens`, `seed` and `choice` from it at admission.
    """

    request_id: str
    model: str
    prompt: Prompt
    sampling: SamplingParams
    max_tokens: int | None = None
    seed: int | None = None
    """None: the gateway draws one at admission and says it in the answer."""
    n: int = 1
    stop: tuple[str, ...] = ()
    include_stop_str: bool = False
    priority: Priority = Priority.NORMAL
    cache_salt: str | None = None
    client: str | None = None
    """The name of the API key that it came with; None: nobody in particular."""
    session: str | None = None
    """Who or what it belongs to, of requests that should be answered alike: a user, a conversation."""
    grammar: Grammar | None = None
    caching: Caching = "use"
    keep_alive_s: float | None = None
    """How long the model stays in memory after this request, if no other comes; below 0: until its
    memory is needed; None: as configured."""
    weight: float = 1.0
    """The client's share beside other clients'."""
    timeout_s: float | None = None
    """From its arrival; then it ends with DeadlineExceeded, and is not begun if that is foreseen."""
    shadow: bool = False
    """A copy of another request: nobody sees its answer, which is compared with the other's."""

    def __post_init__(self) -> None:
        """Raises InvalidRequest naming the first field that is out of its range."""
        r = _require
        r(1 <= self.n <= MAX_CHOICES, "n", f"from 1 to {MAX_CHOICES}", self.n)
        r(len(self.stop) <= MAX_STOPS, "stop", f"at most {MAX_STOPS} strings", len(self.stop))
        for stop in self.stop:
            ok = 0 < len(stop) <= MAX_STOP_CHARS
            r(ok, "stop", f"strings of 1 to {MAX_STOP_CHARS} characters", stop[:20])
        if self.seed is not None:
            r(-(2**63) <= self.seed < 2**64, "seed", "an integer of 64 bits", self.seed)
        r(0 < self.weight <= MAX_WEIGHT, "weight", f"above 0 and at most {MAX_WEIGHT}", self.weight)
        if self.timeout_s is not None:
            ok = 0 < self.timeout_s <= MAX_TIMEOUT_S
            r(ok, "timeout", f"seconds, above 0 and at most {MAX_TIMEOUT_S}", self.timeout_s)
        if self.max_tokens is not None:
            r(self.max_tokens >= 1, "max_tokens", "at least 1", self.max_tokens)
            ok = self.sampling.min_tokens <= self.max_tokens
            r(ok, "min_tokens", "at most max_tokens", self.sampling.min_tokens)
        if self.grammar is not None and self.sampling.ignore_eos:
            raise InvalidRequest(
                f"'ignore_eos' leaves no end to the output that '{self.grammar.param}' describes.",
                param="ignore_eos",
            )


class EmbedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Texts that are to become vectors."""

    request_id: str
    model: str
    inputs: tuple[TextPrompt | TokenPrompt, ...]
    param: str = "input"
    """The field that the client set, for errors; an item of it unless there is `single` text."""
    single: bool = False
    dimensions: int | None = None
    """Keep only so many numbers of each vector, its first ones."""
    normalize: bool = True
    """Scale vectors to length 1."""
    truncate: int | None = None
    """Tokens that are kept of a longer text, at most what the model takes; None: it is an error."""
    prompt_name: str | None = None
    """Which of the model's own prompts precedes each text; None: its default one, if any."""
    priority: Priority = Priority.NORMAL
    client: str | None = None
    keep_alive_s: float | None = None
    """As in `GenerateRequest`."""

    def __post_init__(self) -> None:
        """Raises InvalidRequest naming the first field that is out of its range."""
        r, count = _require, len(self.inputs)
        r(1 <= count <= MAX_INPUTS, self.param, f"1 to {MAX_INPUTS} texts", count)
        if self.dimensions is not None:
            r(self.dimensions >= 1, "dimensions", "at least 1", self.dimensions)
        if self.truncate is not None:
            r(self.truncate >= 1, "truncate", "at least 1", self.truncate)

    def at(self, index: int) -> str:
        """The path of an input."""
        return self.param if self.single else f"{self.param}[{index}]"


class RankRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Documents that are to be ordered by how well they answer a query."""

    request_id: str
    model: str
    query: str
    documents: tuple[str, ...]
    top_n: int | None = None
    """How many of the best to return; None: all."""
    truncate: int | None = None
    """Tokens that are kept of a query and its document together, at the document's cost, at most what
    the model takes; None: more are an error."""
    max_document_tokens: int | None = None
    """Tokens that are kept of a document."""
    instruction: str | None = None
    """What a document is to do for the query; of rerankers that are language models and take one."""
    priority: Priority = Priority.NORMAL
    client: str | None = None

    def __post_init__(self) -> None:
        """Raises InvalidRequest naming the first field that is out of its range."""
        r, count = _require, len(self.documents)
        r(bool(self.query), "query", "a text", self.query)
        r(1 <= count <= MAX_INPUTS, "documents", f"1 to {MAX_INPUTS} texts", count)
        for name in ("top_n", "truncate", "max_document_tokens"):
            value = getattr(self, name)
            r(value is None or value >= 1, name, "at least 1", value)


class Embeddings(msgspec.Struct, frozen=True, kw_only=True):
    """What an `EmbedRequest` gave."""

    request_id: str
    model: str
    vectors: tuple[array[float], ...]
    """One for each input, in their order: `array('f')`, which numpy takes as it is."""
    usage: Usage


class Ranked(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    """Of the document in the request."""
    score: float
    """Higher is better: what a reranker gives, or the cosine of an embedder's vectors."""


class Ranking(msgspec.Struct, frozen=True, kw_only=True):
    """What a `RankRequest` gave, the best first."""

    request_id: str
    model: str
    results: tuple[Ranked, ...]
    usage: Usage


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Natural log-probabilities at one position: the chosen token's, and the most likely ones'."""

    logprob: float
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    """Prompt tokens that were found in a cache."""
    cache_write_tokens: int = 0
    """Prompt tokens that were computed and left in a cache."""
    shared_tokens: int = 0
    """Completion tokens that were computed for another request."""

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class TextLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """One token's log-probability as text, for the API. `raw` is the token's bytes."""

    token: str
    raw: bytes
    logprob: float
    top: tuple[tuple[str, bytes, float], ...] = ()


class ToolCallDelta(msgspec.Struct, kw_only=True):
    """A piece of one tool call. `id` and `name` come with its first piece; `arguments` are
    consecutive pieces of JSON text."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


class TokenEvent(msgspec.Struct, kw_only=True):
    """What a consumer of `gateway.generate()` receives: new text of one choice.

    `text` holds whole characters only; it may be empty (a character or a possible stop string
    is still incomplete). The event with `finish_reason` is the choice's last.
    """

    choice: int
    text: str
    token_ids: list[int]
    logprobs: list[TextLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended the choice, if one did."""
    reasoning: str = ""
    """Text of the model's reasoning, apart from `text`."""
    reasoning_tokens: int = 0
    """Those of `token_ids` that gave `reasoning`."""
    tool_calls: list[ToolCallDelta] | None = None


ENCODERS = ("bert", "roberta", "xlm-roberta", "modernbert", "nomic_bert")
"""The `model_type`s that our own encoder computes; everything else is mlx-lm's."""


KVBits = Literal["off", "16", "8", "4", "k8v4"]
"""Of each number that attention layers keep; `16`: bfloat16, where that is less; `k8v4`: 8 of keys, 4 of
values; `off`: as computed."""

JumpForward = Literal["auto", "on", "off"]

Prepared = Literal["tokenise", "grammar", "hash"]
"""What is made ready for a request before its turn, off the loops that serve others meanwhile."""


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the worker says of a model that it has loaded."""

    model_id: str
    path: str
    adapter_of: str | None = None
    """The model beside whose weights it runs, where it is an adapter: path and sizes are its own then."""
    architecture: str
    context_length: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    quantization: str | None = None
    dtype: str = ""
    parameters: int = 0
    """Numbers in its weights, counted in its files before they were loaded; 0: not known."""
    weight_bytes: int = 0
    """As loaded, before kernels repack them."""
    held_bytes: int = 0
    """Memory that the weights take while it is loaded."""
    kv_bytes_per_token: int = 0
    kv_bits: KVBits = "off"
    load_s: float = 0.0
    kernels: str = "mlx"
    """Which arithmetic runs: `mlx`, or the native kernels' mode."""
    batch_invariant: bool = True
    prefix_reuse: PrefixReuse = "none"
    """How prompts share a beginning: at block boundaries, or where recurrent state was kept."""
    prefix_reuse_why: str = ""
    kind: ModelKind = "decoder"
    embedding_size: int = 0
    """Numbers in a vector; 0: it gives none."""
    max_input_tokens: int = 0
    """Of a text to embed, or of a pair to rank, special tokens included."""
    prefill_step_size: int = 0
    """Tokens that are computed between two decode steps."""
    max_num_seqs: int = 0
    """Sequences that it decodes at once; 0: it decodes none."""
    prompts: Mapping[str, str] = {}
    """Texts that an embedder wants before a text, by the purpose of that."""
    default_prompt: str | None = None
    """The name of the one that precedes a text of no stated purpose."""
    append_eos: bool = False
    """A text ends with the end-of-sequence token, which its vector is taken from."""
    rank_form: RankForm = ""


class CacheStats(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=False):
    """One model's prefix cache: what is in it now, and what it has done since the model was loaded."""

    memory_blocks: int = 0
    memory_bytes: int = 0
    memory_limit_bytes: int = 0
    disk_blocks: int = 0
    disk_bytes: int = 0
    """Of all block files in the folder, other models' included."""
    disk_limit_bytes: int = 0
    memory_hit_tokens: int = 0
    """Prompt tokens that were copied instead of computed, by the tier that had them."""
    disk_hit_tokens: int = 0
    miss_tokens: int = 0
    memory_evictions: int = 0
    """Of blocks, for room."""
    disk_evictions: int = 0
    disk_reads: int = 0
    disk_writes: int = 0
    disk_lost: int = 0
    """Blocks whose file was missing, damaged or another format's when it was read."""
    disk_not_written: int = 0
    """Blocks that a full, broken or slow disk did not take."""
    disk_late: int = 0
    """Requests that could not wait for the disk."""


class ServedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A configured model as /v1/models shows it; unhealthy ones too, with the reason."""

    id: str
    created: int
    """Unix seconds."""
    status: str
    """absent, fetching, loading, ready, draining or failed."""
    reason: str | None = None
    cause: str | None = None
    """Why it failed, for programs: the `code` that a request for it gets."""
    aliases: tuple[str, ...] = ()
    parent: str | None = None
    """The model that an adapter is for."""
    context_length: int | None = None
    pinned: bool = False
    expires_in_s: float | None = None
    """Until it leaves memory if nobody asks for it; None: it does not."""
    wired_bytes: int = 0
    """What of a pinned model's weights cannot be paged out."""
    not_wired: str | None = None
    """Why nothing of a pinned model is."""
