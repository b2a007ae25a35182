"""Every setting, its default, and where it may come from: flag > MLX_SERVING_* > file > default."""

from __future__ import annotations

from typing import Literal

import msgspec

DEFAULT_MODEL = "smollm2-135m"
LogLevel = Literal["debug", "info", "warning", "error"]


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The server's and the Engine's settings. Field names are the YAML keys; `--max-num-seqs` and
    `MLX_SERVING_MAX_NUM_SEQS` are the same setting."""

    models: tuple[str, ...] = (DEFAULT_MODEL,)
    """Alias, hub id, local folder or .gguf file; the first is the default model."""
    served_model_name: tuple[str, ...] = ()
    """Names that clients use, one per model in order; default: the model's own name."""

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    """Serve on this Unix domain socket instead of TCP."""
    log_level: LogLevel = "info"
    max_body_bytes: int = 32 * 1024 * 1024
    drain_timeout_s: float = 30.0

    max_num_seqs: int = 16
    max_queue: int = 1024
    """Requests waiting or running at once; more are refused with 503 and Retry-After."""
    max_tokens: int | None = None
    """Default for requests that do not say; None: what the context leaves."""
    context_length: int | None = None
    prefill_step_size: int | None = None
    """None: what suits the device and its kernels."""
    pipeline_depth: int = 2
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    kernels: Literal["auto", "exact", "fast", "f32", "off"] = "auto"
    exact_batch: bool = False
    chat_template: str | None = None
    """A Jinja file that replaces the model's own."""

    supervise: bool = True
    load_timeout_s: float = 600.0
    home: str | None = None
    """Where converted models are kept; None: $XDG_CACHE_HOME/mlx-serving."""
    offline: bool = False
    """Never fetch; use what is on disk."""
