"""Loads an MLX model folder through mlx-lm and makes it ready to step."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
from mlx.nn.layers.base import Module

from mlx_serving.errors import ModelBroken
from mlx_serving.runtime.backend.adapters import Adapters
from mlx_serving.runtime.backend.arch import head_on_last, make_store
from mlx_serving.runtime.backend.embedder import check_decoder, decoder_classes
from mlx_serving.runtime.backend.grammar import Grammars, tokenizer_file
from mlx_serving.runtime.backend.held import weights_of
from mlx_serving.runtime.backend.judge import Classifier, Judge, is_classifier, read_judge
from mlx_serving.runtime.backend.kernels import Kernels, decoder_kernels
from mlx_serving.runtime.backend.kv import KVStore
from mlx_serving.runtime.backend.loader import failed, read_json
from mlx_serving.runtime.backend.memory import MLXMemory, budget_bytes
from mlx_serving.runtime.backend.model import LoadedModel, OnPhase
from mlx_serving.runtime.backend.pooling import (
    Pooling,
    RowPooler,
    is_embedder,
    max_seq_length,
    read_pooling,
    read_prompts,
)
from mlx_serving.runtime.backend.prefix import prefill_grain, prefix_plan
from mlx_serving.runtime.backend.quantized_kv import FORMATS, Unquantizable, check, refusal
from mlx_serving.runtime.backend.runaway import Bounds
from mlx_serving.runtime.backend.runner import MLXRunner
from mlx_serving.runtime.backend.tier import FILE_OVERHEAD_BYTES, Tier, open_folder
from mlx_serving.runtime.backend.views import round_up
from mlx_serving.runtime.backend.weights import (
    arrays,
    cast,
    dtype_name,
    evaluate,
    quantization,
    target_dtype,
)
from mlx_serving.runtime.core.plan import DecodeRow, Limits, PrefillChunk, RowStart, StepPlan
from mlx_serving.runtime.slices import Slices
from mlx_serving.types import ModelInfo, ModelKind, SamplingParams
from mlx_serving.worker.wire import ModelOptions

KV_BUCKET = 256
DEFAULT_CONTEXT = 8192
"""Where neither the model's config nor its tokenizer's says."""
PREFILL_STEP_CPU, PREFILL_STEP_NATIVE, PREFILL_STEP_GPU = 8, 256, 512
"""Stock MLX on a CPU computes a token at a time anyway, so short chunks cost nothing there, stall
running streams least, and let prefixes be reused in short blocks."""
LEAST_PREFILL_TOKENS = 32
"""Of several prompts in one step, where chunks are shorter: prompts that come together start together."""
_CONTEXT_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "model_max_length",
    "seq_length",
    "n_ctx",
)
_WARM_UP_TOKENS = 4


def load(
    model_id: str, path: Path, config: dict[str, Any], options: ModelOptions, on_phase: OnPhase
) -> Slices[LoadedModel]:
    """See `loader.load`, which has read `config` and checked that the weights' files are whole."""
    began = time.monotonic()
    form = FORMATS[options.kv_bits]
    if form is not None:
        _refuse(refusal(config))
    gpu = mx.default_device().type == mx.gpu
    model, config = yield from _load_weights(path, config, options.dtype, gpu)
    weight_bytes = sum(a.nbytes for a in arrays(model))
    kernels = yield from decoder_kernels(model, config["model_type"], options.kernels, gpu, form)
    held_bytes = sum(a.nbytes for a in arrays(model)) + kernels.packed_bytes
    eos = eos_token_ids(path, config)
    store = make_store(
        model,
        config["model_type"],
        options.max_num_seqs,
        bucket=KV_BUCKET,
        exact_batch=options.exact_batch,
        attention=kernels.attention,
        in_place=kernels.in_place,
    )
    if form is not None:
        _refuse(check(store))
    vocab_size = _vocab_size(model)
    judge = read_judge(path, config)
    pooling = judge.pooling if isinstance(judge, Classifier) else read_pooling(path, "last")
    prompts, default_prompt = read_prompts(path)
    backbone = head_on_last(model)
    adapters = Adapters(model, native=kernels.native, fused=kernels.fused)
    runner = MLXRunner(
        model,
        store,
        kernels.sampler(vocab_size, eos, options.max_num_seqs),
        max_rows=options.max_num_seqs,
        backbone=backbone,
        exact_batch=options.exact_batch,
        pooler=RowPooler(pooling),
        foresight=_jumps(options, kernels, store),
        judge=judge if isinstance(judge, Judge) else None,
        adapters=adapters,
    )
    grammars = Grammars(tokenizer_file(path, options), vocab_size, eos, Bounds.of(options))
    grammars.warm()
    yield
    on_phase("compiling", model_id)
    kv_bytes, state_bytes = _warm_up(runner, store, vocab_size, options.max_num_seqs)
    step_size = options.prefill_step_size or _prefill_step(gpu, kernels.name)
    device = MLXMemory(budget_bytes(options.memory_budget, mx.device_info(), gpu))
    room = device.usable_bytes - held_bytes
    prefix = prefix_plan(
        store.prefix_reuse, step_size, kernels.invariant, kv_bytes, state_bytes, room, options
    )
    context = context_length(config, path)
    if options.context_length is not None:
        context = min(context, options.context_length)
    rows = options.max_num_seqs
    most = rows * round_up(context, KV_BUCKET)
    # Slabs that always have every row cannot give way to prefixes; others share one room with them.
    fixed = prefix.total_bytes if options.exact_batch else 0
    held_kv_bytes = kv_bytes + store.scratch_bytes_per_token()
    capacity = _kv_capacity(held_bytes, room - fixed, held_kv_bytes, most)
    store.set_budget(capacity)
    row_tokens = round_up(min(context, capacity), KV_BUCKET) + KV_BUCKET
    # What attention reads in another form than it is kept is as wide as the longest row anyway.
    plain = 0 < kv_bytes == held_kv_bytes and not options.exact_batch
    space = kernels.space if plain else None
    own_rows = space is not None and store.reserve(space, row_tokens, kv_bytes)
    if prefix.blocks:
        store.open_pool(prefix.blocks, prefix.block_tokens)
    if options.exact_batch:
        # The slabs then always have every row.
        context = min(context, max(KV_BUCKET, capacity // rows // KV_BUCKET * KV_BUCKET))
    folder = open_folder(path, config, options, prefix, step_size, kernels.name, dtype_name(model))
    on_disk = None
    if folder is not None:
        runner.keep_on(Tier(folder, store))
        on_disk = folder.open()
    limits = Limits(
        max_num_seqs=rows,
        prefill_step_size=step_size,
        prefill_budget=None if options.prefill_step_size else max(step_size, LEAST_PREFILL_TOKENS),
        context_length=context,
        kv_capacity_tokens=capacity,
        kv_bytes_per_token=0 if options.exact_batch else held_kv_bytes,
        kv_bucket_tokens=KV_BUCKET,
        kv_own_rows=own_rows,
        eos_token_ids=eos,
        max_itl_s=options.max_itl_ms / 1e3,
        prefill_grain=prefill_grain(store.prefix_reuse, kernels.invariant, step_size, options),
        prefix_blocks=prefix.blocks,
        prefix_block_tokens=prefix.block_tokens,
        prefix_whole_chunks=prefix.whole_chunks,
        prefix_block_bytes=prefix.block_bytes,
        disk_block_bytes=prefix.block_bytes + FILE_OVERHEAD_BYTES,
        disk_bytes=0 if folder is None else options.kv_disk_bytes,
    )
    kind: ModelKind = "embedder" if is_embedder(path) else "decoder"
    if judge is not None:
        kind = "reranker"
    info = ModelInfo(
        model_id=model_id,
        path=str(path),
        architecture=config["model_type"],
        context_length=context,
        vocab_size=vocab_size,
        eos_token_ids=eos,
        quantization=quantization(config),
        dtype=dtype_name(model),
        weight_bytes=weight_bytes,
        held_bytes=held_bytes,
        kv_bytes_per_token=kv_bytes,
        kv_bits=options.kv_bits,
        load_s=time.monotonic() - began,
        kernels=kernels.name,
        batch_invariant=kernels.invariant or options.exact_batch or not store.batched,
        prefix_reuse=prefix.reuse,
        prefix_reuse_why=prefix.why,
        kind=kind,
        embedding_size=0 if judge else _embedding_size(backbone, pooling),
        max_input_tokens=min(context - 1, max_seq_length(path) or context),
        prefill_step_size=step_size,
        max_num_seqs=rows if kind == "decoder" else 0,
        prompts=prompts,
        default_prompt=default_prompt,
        append_eos=is_embedder(path) and pooling.mode == "last",
        rank_form="" if judge is None else judge.form,
    )
    taken = adapters if kind == "decoder" else None
    weights = weights_of(model, held_bytes, gpu)
    return LoadedModel(
        info, runner, limits, grammars, on_disk, runner.close, device, taken, weights
    )


def _jumps(options: ModelOptions, kernels: Kernels, store: KVStore) -> bool:
    """Of itself only where a run is a few lines more in the rows' own forward pass, and the same bits:
    elsewhere it has a forward pass to itself, which costs where there are many rows."""
    if options.jump_forward == "auto":
        return kernels.invariant and store.ragged and not options.exact_batch
    return options.jump_forward == "on"


def _load_weights(
    path: Path, config: dict[str, Any], dtype: str, gpu: bool
) -> Slices[tuple[Module, dict[str, Any]]]:
    from mlx_lm.utils import load_model

    if config.get("model_file"):
        raise ModelBroken(
            f"{path}: config.json asks to run {config['model_file']!r}, which is refused"
        )
    classifies = is_classifier(config)
    made_for_vectors = is_embedder(path) and not classifies
    if made_for_vectors:
        check_decoder(path, config)
    try:
        if made_for_vectors or classifies:
            headless = {"tie_word_embeddings": True}
            model, config = load_model(path, True, True, headless, decoder_classes)
        else:
            model, config = load_model(path, lazy=True)
        cast(model, target_dtype(dtype, gpu))
        yield
        yield from evaluate(model)
    except MemoryError as e:
        raise ModelBroken(f"{path}: not enough memory for the weights") from e
    except Exception as e:
        raise failed(str(path), e) from e
    return model, config


def _prefill_step(gpu: bool, kernels: str) -> int:
    if gpu:
        return PREFILL_STEP_GPU
    return PREFILL_STEP_CPU if kernels == "mlx" else PREFILL_STEP_NATIVE


def _warm_up(runner: MLXRunner, store: KVStore, vocab_size: int, rows: int) -> tuple[int, int]:
    """Run one prompt, a decode step alone and, with room, one of two rows: the shapes that the
    backend compiles or measures. Returns the bytes of one token's KV and of one row's state."""
    count = min(rows, 2)
    prompt = tuple(i % vocab_size for i in range(_WARM_UP_TOKENS))
    n = len(prompt)
    params = (SamplingParams(temperature=0.0), SamplingParams(temperature=1.0, logprobs=1))
    starts = tuple(RowStart(i, i, prompt, n, params[i]) for i in range(count))
    chunks = tuple(PrefillChunk(i, i, prompt, 0, samples=True) for i in range(count))
    try:
        runner.launch(StepPlan(0, starts=starts, prefill=chunks)).wait()
        runner.launch(StepPlan(1, decode=(DecodeRow(0, 0, n, None),))).wait()
        both = tuple(DecodeRow(i, i, n + 1 - i, None) for i in range(count))
        runner.launch(StepPlan(2, decode=both)).wait()
    except ModelBroken:
        raise
    except Exception as e:
        raise failed("the model cannot run", e) from e
    sizes = store.bytes_per_token(), store.state_bytes()
    runner.reset()
    mx.clear_cache()
    return sizes


def _refuse(why: str | None) -> None:
    if why is not None:
        raise Unquantizable(why)


def _kv_capacity(weight_bytes: int, room: int, kv_bytes: int, most: int) -> int:
    """Row tokens that fit into `room` bytes, at most those that `most` row tokens can use."""
    if kv_bytes == 0:
        return most
    tokens = room // kv_bytes // KV_BUCKET * KV_BUCKET
    if tokens < KV_BUCKET:
        raise ModelBroken(
            f"not enough memory: {weight_bytes / 2**30:.1f} GiB of weights leave {room / 2**30:.1f} GiB, "
            f"less than {KV_BUCKET} tokens of KV need"
        )
    return min(tokens, most)


def _embedding_size(backbone: Module | None, pooling: Pooling) -> int:
    return 0 if backbone is None else pooling.size(hidden_size(backbone))


def hidden_size(backbone: Any) -> int:
    """From the graph of a forward pass that is not computed."""
    size: int = backbone.hidden(mx.zeros((1, 1), mx.int32)).shape[-1]
    return size


def _vocab_size(model: Module) -> int:
    """The logits' width, from the graph of a forward pass that is not computed."""
    try:
        width: int = model(mx.zeros((1, 1), mx.int32)).shape[-1]
    except Exception as e:
        raise failed("the model cannot run", e) from e
    return width


def context_length(config: Mapping[str, Any], path: Path) -> int:
    """Tokens: the first of the usual keys in `text_config`, the config, the tokenizer's config."""
    tokenizer = read_json(path / "tokenizer_config.json")
    for source in (config.get("text_config") or {}, config, tokenizer):
        for key in _CONTEXT_KEYS:
            value = source.get(key)
            # Tokenizers write 1e30 for "no limit".
            if isinstance(value, int) and 0 < value < 1 << 32:
                return value
    return DEFAULT_CONTEXT


def eos_token_ids(path: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Every id that ends a sequence: generation_config's, config's, and the tokenizer's `eos_token`."""
    generation = read_json(path / "generation_config.json")
    found: dict[int, None] = {}
    for source in (generation, config, config.get("text_config") or {}):
        for token_id in _as_ids(source.get("eos_token_id")):
            found[token_id] = None
    by_name = _tokenizer_eos(path)
    if by_name is not None:
        found[by_name] = None
    return tuple(found)


def _as_ids(value: Any) -> Iterable[int]:
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool)]


def _tokenizer_eos(path: Path) -> int | None:
    settings = read_json(path / "tokenizer_config.json")
    eos = settings.get("eos_token")
    text = eos.get("content") if isinstance(eos, dict) else eos
    if not isinstance(text, str):
        return None
    for token_id, token in settings.get("added_tokens_decoder", {}).items():
        if token.get("content") == text:
            return int(token_id)
    file = path / "tokenizer.json"
    try:
        tokenizer = msgspec.json.decode(file.read_bytes(), type=_TokenizerFile)
        for token in tokenizer.added_tokens:
            if token.content == text:
                return token.id
        vocab = msgspec.json.decode(tokenizer.model).get("vocab")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise ModelBroken(f"{file} cannot be read: {e}") from e
    known = vocab.get(text) if isinstance(vocab, dict) else None
    return known if isinstance(known, int) else None


class _AddedToken(msgspec.Struct):
    id: int
    content: str


class _TokenizerFile(msgspec.Struct):
    """What is wanted of it: most is the vocabulary, which takes a while to decode."""

    added_tokens: list[_AddedToken] = []
    model: msgspec.Raw = msgspec.Raw(b"{}")
