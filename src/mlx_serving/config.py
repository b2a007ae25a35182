"""Every setting, its default and its range. `config_sources` reads them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Literal, get_args

import msgspec
from msgspec import Meta

from mlx_serving.model_entry import ENTRY_FIELDS, ModelEntry
from mlx_serving.types import JumpForward, KVBits

DEFAULT_MODEL = "smollm2-135m"
ENV_PREFIX = "MLX_SERVING_"
LogLevel = Literal["debug", "info", "warning", "error"]
ToolParser = Literal[
    "auto",
    "none",
    "deepseek",
    "deepseek_v32",
    "function_gemma",
    "gemma4",
    "glm",
    "harmony",
    "hermes",
    "kimi",
    "lfm_pythonic",
    "llama3_json",
    "llama_pythonic",
    "minimax",
    "mistral",
    "qwen3_coder",
]
ReasoningParser = Literal[
    "auto",
    "none",
    "cohere",
    "deepseek_r1",
    "gemma4",
    "harmony",
    "kimi",
    "kimi_vl",
    "mistral",
    "seed_oss",
    "think",
]


Remedy = Literal[
    "roll_back",
    "shed_low",
    "shed_normal",
    "limit_admission",
    "smaller_chunks",
    "lower_ceiling",
    "raise_ceiling",
    "raise_class",
    "evict_idle",
]
AlertFormat = Literal["json", "slack", "pagerduty"]


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The server's and the Engine's settings. Field names are the YAML keys; `--max-num-seqs` and
    `MLX_SERVING_MAX_NUM_SEQS` are the same setting.

    The docstring under a field is its help text; a range is part of its type.
    """

    models: Annotated[tuple[str | ModelEntry, ...], Meta(min_length=1)] = (DEFAULT_MODEL,)
    """Alias, hub id, local folder or .gguf file; the first is the default model."""
    served_model_name: tuple[str, ...] = ()
    """Names that clients use, one per model in order; default: the model's own name."""
    model_aliases: tuple[str, ...] = ()
    """More names that clients may use: PATTERN for the default model, PATTERN=MODEL for another; claude-* for Claude Code."""
    adapter: tuple[str, ...] = ()
    """A LoRA adapter beside a model: NAME=FOLDER for the default model, MODEL+NAME=FOLDER for another (docs/adapters.md)."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Type of activations and unquantised weights; auto: the model's own."""
    context_length: Annotated[int, Meta(ge=1)] | None = None
    """Longest prompt and answer together, in tokens; default: the model's own."""
    chat_template: str | None = None
    """A Jinja file that replaces the model's own template."""
    tool_parser: ToolParser = "auto"
    """How the model writes tool calls; auto: read off its chat template."""
    reasoning_parser: ReasoningParser = "auto"
    """What the model's reasoning stands between; auto: read off its chat template."""
    home: str | None = None
    """Where converted models are kept; default: $XDG_CACHE_HOME/mlx-serving."""
    offline: bool = False
    """Never fetch; use what is on disk."""

    host: Annotated[str, Meta(min_length=1)] = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Meta(ge=0, le=65535)] = 8000
    """Port to listen on; 0 picks a free one."""
    uds: Annotated[str, Meta(min_length=1)] | None = None
    """Serve on this Unix domain socket instead of TCP."""
    api_key: tuple[str, ...] = ()
    """A key that clients must send, or its hash as 'mlx-serving keys new' prints it; hashed at once."""
    api_keys_file: Annotated[str, Meta(min_length=1)] | None = None
    """A YAML file of API keys with limits of their own (docs/security.md)."""
    admin_key: Annotated[str, Meta(min_length=1)] | None = None
    """Key, or its hash, for routes that change what runs; without it they answer this machine only."""
    metrics_access: Literal["open", "key", "admin"] = "key"
    """Who may read /metrics: anybody, any key's holder, or the admin key's."""
    tls_cert: Annotated[str, Meta(min_length=1)] | None = None
    """Serve HTTPS with this certificate (PEM, its chain behind it)."""
    tls_key: Annotated[str, Meta(min_length=1)] | None = None
    """The certificate's private key (PEM); default: it is in the certificate's file."""
    cors_origin: tuple[str, ...] = ()
    """Web pages of this origin (https://chat.example.org) may use the server; others may not."""
    allowed_host: tuple[str, ...] = ()
    """Another name for a server on loopback, as a proxy that keeps the Host header calls it."""
    max_connections: Annotated[int, Meta(ge=1)] = 4096
    """Connections at once, as far as file descriptors go; more are told 503."""
    max_header_bytes: Annotated[int, Meta(ge=1024)] = 64 * 1024
    """Larger request heads are refused with 431."""
    header_timeout_s: Annotated[float, Meta(gt=0)] = 20.0
    """How long a request's head may take to arrive."""
    body_timeout_s: Annotated[float, Meta(gt=0)] = 120.0
    """How long a request's body may take to arrive."""
    write_timeout_s: Annotated[float, Meta(gt=0)] = 300.0
    """How long a client may leave unread what no longer fits in the buffers before it is cut off."""
    max_body_bytes: Annotated[int, Meta(ge=1024)] = 32 * 1024 * 1024
    """Larger request bodies are refused with 413."""
    rollouts_file: Annotated[str, Meta(min_length=1)] | None = None
    """Where canaries and A/B tests are kept; default for servers: rollouts-PORT.json in home."""
    feature_flags: tuple[str, ...] = ()
    """A share of the requests that is answered otherwise: 'NAME=PERCENT% use=MODEL', 'NAME=PERCENT% max_tokens=256' (docs/rollouts.md)."""
    slo: tuple[str, ...] = ()
    """A service level to watch: 'ttft p95 < 500ms', 'errors < 1%' (docs/service-levels.md)."""
    slo_remedies: tuple[Remedy, ...] = ()
    """What may be done about a level that is not kept, in this order: roll_back, shed_low, shed_normal, limit_admission, smaller_chunks, lower_ceiling, raise_ceiling, raise_class, evict_idle."""
    slo_dry_run: bool = False
    """Say what remedies would be applied, and apply none."""
    alert_webhook: Annotated[str, Meta(min_length=1)] | None = None
    """URL that is told of service levels; for PagerDuty with the routing key behind a #."""
    alert_format: AlertFormat = "json"
    """How it is told."""
    watch_drift: bool = False
    """Learn how fast models answer here, and warn when that gets worse and stays so."""
    baselines_file: Annotated[str, Meta(min_length=1)] | None = None
    """Where it is kept what was learnt; default for servers: baselines-PORT.json in home."""
    drain_timeout_s: Annotated[float, Meta(ge=0)] = 30.0
    """How long running streams may take to finish after SIGTERM or SIGINT."""
    ping_interval_s: Annotated[float, Meta(ge=0)] = 15.0
    """How often a stream with nothing to say sends a comment, lest a proxy give it up; 0: never."""
    unknown_fields: Literal["refuse", "warn"] = "refuse"
    """What becomes of a request's fields that nobody knows; warn: they are left out and named in a header."""
    log_level: LogLevel = "info"
    """Least severe message to log."""

    max_num_seqs: Annotated[int, Meta(ge=1, le=4096)] = 16
    """Sequences that decode at once."""
    usual_num_seqs: Annotated[int, Meta(ge=1)] | None = None
    """Sequences that decode at once unless a remedy (raise_ceiling) finds room for more; default: max-num-seqs."""
    find_knee: bool = False
    """Find out how many sequences at once are worth it, and decode no more: up to max-num-seqs, within tpot levels of slo."""
    concurrency_limit: Annotated[int, Meta(ge=1)] | None = None
    """Sequences that decode at once, fixed by hand: no guard and no remedy changes it."""
    step_limit_ms: Annotated[float, Meta(ge=0)] = 0.0
    """Where most steps take longer, fewer sequences decode at once until they do not; 0: no limit."""
    max_queue: Annotated[int, Meta(ge=1)] = 1024
    """Requests of one class (critical, high, normal, low) waiting or running at once; more are refused with 503 and Retry-After."""
    class_queue: tuple[str, ...] = ()
    """Requests of one class waiting or running at once, where not max-queue: CLASS=COUNT; low=64."""
    max_wait_s: Annotated[float, Meta(ge=0)] = 60.0
    """A request that has waited so long for a row goes before every class, in an eighth of the rows; 0: never."""
    short_jobs_first: bool = False
    """Within a class, requests with a small max_tokens go before others that came up to 10 s earlier."""
    coalesce: Literal["off", "deterministic", "all"] = "off"
    """Which identical requests share one sequence while it runs; deterministic: greedy or seeded ones."""
    coalesce_subscribers: Annotated[int, Meta(ge=1, le=10_000)] = 100
    """Requests that one sequence may serve; the next one starts another."""
    response_cache: Literal["off", "memory", "disk", "redis"] = "off"
    """Where whole answers of greedy and seeded requests are kept, for when the same is asked again."""
    response_cache_ttl_s: Annotated[float, Meta(gt=0)] = 300.0
    """How long an answer is kept."""
    response_cache_entries: Annotated[int, Meta(ge=1)] = 4096
    """Answers kept at most; the least recently used leave first."""
    response_cache_tokens: Annotated[int, Meta(ge=1)] = 2_000_000
    """Tokens of answers kept at most."""
    response_cache_bytes: Annotated[int, Meta(ge=1024)] = 64 * 1024 * 1024
    """Bytes of answers kept at most."""
    response_cache_url: Annotated[str, Meta(min_length=1)] = "redis://127.0.0.1:6379/0"
    """The Redis or Valkey server of response-cache redis."""
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    """Answer length for requests that do not say; default: what the context leaves."""
    queue_timeout_s: Annotated[float, Meta(gt=0)] | None = None
    """How long a request may wait to be begun before it gets a 503; default: as long as it takes."""
    first_token_timeout_s: Annotated[float, Meta(gt=0)] | None = None
    """How long a request may be without its first token before it gets a 504; default: no limit."""
    request_timeout_s: Annotated[float, Meta(gt=0)] | None = None
    """How long a request may take altogether before it is ended with an error; default: no limit."""
    prefill_step_size: Annotated[int, Meta(ge=1)] | None = None
    """Largest prefill chunk, in tokens; default: what suits the device and its kernels."""
    max_itl_ms: Annotated[float, Meta(ge=0)] = 0.0
    """Longest gap between tokens that others' prompts should cause running streams; 0: no target."""
    pipeline_depth: Annotated[int, Meta(ge=1, le=3)] = 2
    """Steps in flight; 1 waits for each step's tokens before it plans the next."""
    kernels: Literal["auto", "exact", "fast", "f32", "off"] = "auto"
    """CPU only: which native kernels replace MLX's own; off is stock MLX."""
    kv_bits: KVBits = "off"
    """In how many bits attention keeps keys and values; 16: bfloat16; k8v4: keys in 8, values in 4; off: as computed."""
    prefix_cache_bytes: Annotated[int, Meta(ge=0)] | None = None
    """Memory for prompts' common beginnings, in bytes; 0: off; default: a quarter of what KV may take."""
    kv_disk_path: Annotated[str, Meta(min_length=1)] | None = None
    """Folder in which prompts' common beginnings are kept over restarts; default: nowhere."""
    kv_disk_bytes: Annotated[int, Meta(ge=0)] = 8 * 1024**3
    """What the files in kv-disk-path may take, in bytes; what is worth least is deleted."""
    memory_budget: Annotated[float, Meta(gt=0)] | None = None
    """Memory for models, their KV and prefixes: bytes, or up to 1 a share of the device's; default: 0.6, of a GPU 0.85."""
    keep_alive_s: Annotated[float, Meta(ge=-1)] = -1.0
    """How long a model stays in memory after its last request; -1: until its memory is needed."""
    pin: tuple[str, ...] = ()
    """Models, by served name, that are never unloaded to make room or for idleness."""
    memory_wait_s: Annotated[float, Meta(ge=0)] = 120.0
    """How long a request may wait for a model that does not fit beside those in use; then 503."""
    prefetch: Annotated[float, Meta(ge=0, le=1)] = 0.0
    """Confidence from which the model that usually comes next is loaded, or its files read, ahead; 0: never."""
    exact_batch: bool = False
    """Always decode max-num-seqs rows, so that logits are bit-equal whatever the batch."""
    jump_forward: JumpForward = "auto"
    """Compute tokens that a grammar forces several at once; auto: where that never costs."""
    json_digit_tokens: Annotated[int, Meta(ge=0)] = 40
    """Tokens of digits after which a number of constrained JSON ends, if its schema lets it; 0: never."""
    json_string_tokens: Annotated[int, Meta(ge=0)] = 16_384
    """Tokens after which a string of constrained JSON ends, if its schema lets it; 0: never."""
    json_white_space: Annotated[int, Meta(ge=0, le=1000)] = 20
    """Most blanks, tabs and line ends between two tokens of constrained JSON."""

    supervise: bool = True
    """Run the model in a worker process that may die; off: in this process."""
    load_timeout_s: Annotated[float, Meta(gt=0)] = 600.0
    """How long a model may take to load before its worker is taken for hung."""
    step_timeout_s: Annotated[float, Meta(gt=0)] = 300.0
    """How long one step may take before its worker is taken for hung and replaced."""
    silence_timeout_s: Annotated[float, Meta(ge=5)] = 60.0
    """How long a worker may give no sign of life, which it does every second or two."""
    worker_rss_limit_bytes: Annotated[int, Meta(ge=0)] = 0
    """A worker whose resident memory grows beyond this is replaced; its streams go on in the next one; 0: no limit."""
    resume_timeout_s: Annotated[float, Meta(ge=0)] = 300.0
    """How long streams whose worker died wait for the next one."""
    max_request_deaths: Annotated[int, Meta(ge=1)] = 3
    """Workers in a row that may die as they begin a request before it is given up."""

    @property
    def entries(self) -> tuple[ModelEntry, ...]:
        """`models`, those that are only a name too."""
        return tuple(m if isinstance(m, ModelEntry) else ModelEntry(model=m) for m in self.models)

    def of(self, entry: ModelEntry) -> Config:
        """The settings of one model: its own in place of everybody's."""
        return msgspec.structs.replace(self, **entry.settings)


SECRETS = frozenset({"api_key", "admin_key"})
"""Settings that are hashed where they are read, and never shown."""

FIELDS: dict[str, msgspec.structs.FieldInfo] = {f.name: f for f in msgspec.structs.fields(Config)}
KINDS = {**ENTRY_FIELDS, **FIELDS}
"""What may have a value: a setting, or a key of a model's entry."""


def is_list(name: str) -> bool:
    """Whether the setting holds several texts (a repeated flag, commas in a variable)."""
    return isinstance(KINDS[name].default, tuple)


def is_bool(name: str) -> bool:
    return KINDS[name].type is bool


def flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def env_name(name: str) -> str:
    return ENV_PREFIX + name.upper()


def choices(name: str) -> tuple[str, ...]:
    """The words that the setting, or an item of its list, may be; empty if any text may be."""
    kind = KINDS[name].type
    if is_list(name):
        kind = get_args(kind)[0]
    return get_args(kind) if "Literal[" in str(kind) else ()


def describe(name: str) -> str:
    """The setting's type in plain words: `int`, `one of debug, info`, `true or false`."""
    if words := choices(name):
        return "one of " + ", ".join(words)
    if is_bool(name):
        return "true or false"
    if is_list(name):
        return "a list of texts" + (", or of system and user" if name == "warm_up" else "")
    return metavar(name)


def metavar(name: str) -> str:
    """`int`, `float` or `text`."""
    kind = str(KINDS[name].type)
    return next((word for word in ("int", "float") if re.search(rf"\b{word}\b", kind)), "text")


def unknown(name: str, kind: str) -> str:
    """`unknown key 'prot' (did you mean 'port'?)`."""
    close = closest(name)
    return f"unknown {kind} '{name}'" + (f" (did you mean '{close}'?)" if close else "")


def closest(name: str, among: Iterable[str] = FIELDS) -> str | None:
    """The field whose name is most like `name`, if one is."""
    from difflib import get_close_matches  # only when something is wrong

    found = get_close_matches(name.replace("-", "_").lower(), list(among), n=1)
    return found[0] if found else None
