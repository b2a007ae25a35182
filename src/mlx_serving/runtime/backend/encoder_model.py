"""Loads an encoder (embedder or cross-encoder) and runs the scheduler's plans with it.

To the scheduler a text is a sequence that ends with its prompt: a step takes as many whole texts
as its token budget holds, and their vectors are its result. There is no KV to keep.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import msgspec
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.quantized import QuantizedLinear, quantize

from mlx_serving.errors import ModelBroken
from mlx_serving.runtime.backend.encoder import Encoder, EncoderConfig, TextEncoder, pack, rename
from mlx_serving.runtime.backend.held import weights_of
from mlx_serving.runtime.backend.kernels import accelerate
from mlx_serving.runtime.backend.loader import failed
from mlx_serving.runtime.backend.memory import MLXMemory, budget_bytes
from mlx_serving.runtime.backend.model import LoadedModel, OnPhase
from mlx_serving.runtime.backend.pooling import (
    Pooling,
    max_seq_length,
    read_pooling,
    read_prompts,
    score_activation,
    to_bytes,
)
from mlx_serving.runtime.backend.rotary_encoder import (
    ModernBert,
    ModernBertConfig,
    NomicBert,
    NomicBertConfig,
    rename_modern,
    rename_nomic,
)
from mlx_serving.runtime.backend.weights import (
    arrays,
    cast,
    dtype_name,
    evaluate,
    quantization,
    target_dtype,
)
from mlx_serving.runtime.core.plan import (
    Limits,
    PrefillChunk,
    RowStart,
    Sampled,
    StepPlan,
    StepResult,
)
from mlx_serving.runtime.slices import Slices
from mlx_serving.types import ENCODERS, ModelInfo, SamplingParams
from mlx_serving.worker.wire import ModelOptions

STEP_TOKENS_CPU, STEP_TOKENS_GPU = 64, 8192
"""Of one forward pass, more only for a single text: how long another model's streams may wait for it."""
MAX_TEXTS = 256
"""That are computed or wait for the step in flight."""
KV_BUCKET = 256

Score = Callable[[mx.array], mx.array]
Parsed = EncoderConfig | ModernBertConfig | NomicBertConfig


class Family(NamedTuple):
    config: type[Parsed]
    model: Callable[[Any, int], TextEncoder]
    """Of a config, and of how many labels it gives instead of a vector."""
    rename: Callable[[dict[str, Any], int], dict[str, Any]]


_BERT = Family(EncoderConfig, Encoder, rename)
FAMILIES = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "modernbert": Family(ModernBertConfig, ModernBert, rename_modern),
    "nomic_bert": Family(NomicBertConfig, NomicBert, rename_nomic),
}
assert FAMILIES.keys() == set(ENCODERS)


class EncoderStep:
    def __init__(self, step_id: int, vectors: dict[int, mx.array]) -> None:
        self._step_id = step_id
        self._vectors = vectors
        """By seq_id."""

    def wait(self) -> StepResult:
        sampled = [Sampled(i, [], vector=to_bytes(v)) for i, v in self._vectors.items()]
        return StepResult(self._step_id, sampled)


class EncoderRunner:
    """Implements `core.plan.Runner`. `exact_batch`: one forward pass a text."""

    def __init__(
        self,
        model: TextEncoder,
        pooling: Pooling,
        score: Score | None,
        *,
        exact_batch: bool = False,
    ) -> None:
        self._model = model
        self._pooling = pooling
        self._score = score
        self._exact_batch = exact_batch

    def launch(self, plan: StepPlan) -> EncoderStep:
        second_at = {start.row: start.second_at for start in plan.starts}
        chunks = plan.prefill
        batches = [[chunk] for chunk in chunks] if self._exact_batch else [list(chunks)]
        vectors: dict[int, mx.array] = {}
        for batch in batches:
            if batch:
                vectors |= self._forward(batch, [second_at[chunk.row] for chunk in batch])
        mx.async_eval(list(vectors.values()))
        return EncoderStep(plan.step_id, vectors)

    def foresee(self) -> tuple[()]:
        return ()

    def reset(self) -> None:
        pass

    def _forward(
        self, chunks: Sequence[PrefillChunk], second_at: Sequence[int | None]
    ) -> dict[int, mx.array]:
        assert all(chunk.start == 0 and chunk.samples for chunk in chunks), "texts come whole"
        batch = pack([chunk.token_ids for chunk in chunks], second_at)
        pooled = mx.concatenate([self._vectors(group) for group in self._model(batch)])
        return {chunks[at].seq_id: pooled[i] for i, at in enumerate(batch.order)}

    def _vectors(self, hidden: mx.array) -> mx.array:
        """`[texts, length, hidden]` to `[texts, size]`."""
        if self._model.head is None or self._score is None:
            return self._pooling(hidden.astype(mx.float32))
        return self._score(self._model.head(hidden).astype(mx.float32))


def load(
    model_id: str, path: Path, config: dict[str, Any], options: ModelOptions, on_phase: OnPhase
) -> Slices[LoadedModel]:
    """See `loader.load`."""
    began = time.monotonic()
    gpu = mx.default_device().type == mx.gpu
    parsed = _parse(path, config)
    classes = config.get("architectures") or ()
    ranks = any(str(name).endswith("ForSequenceClassification") for name in classes)
    model = _load_weights(path, parsed, config, ranks)
    cast(model, target_dtype(options.dtype, gpu))
    yield from evaluate(model)
    weight_bytes = sum(a.nbytes for a in arrays(model))
    dtype = dtype_name(model)
    report = yield from accelerate(model, options.kernels, gpu)
    kernels = "mlx" if report is None else report.mode
    if kernels != "mlx":
        _use_kernels(model, parsed)
    pooling = read_pooling(path, "mean")
    prompts, default_prompt = read_prompts(path)
    score = score_activation(path, config) if ranks else None
    runner = EncoderRunner(model, pooling, score, exact_batch=options.exact_batch)
    on_phase("compiling", model_id)
    _warm_up(runner)
    context = min(
        parsed.max_tokens,
        max_seq_length(path) or parsed.max_tokens,
        options.context_length or parsed.max_tokens,
    )
    step_tokens = STEP_TOKENS_GPU if gpu else STEP_TOKENS_CPU
    longest = max(context, step_tokens)
    info = ModelInfo(
        model_id=model_id,
        path=str(path),
        architecture=parsed.model_type,
        context_length=context,
        vocab_size=parsed.vocab_size,
        eos_token_ids=(),
        quantization=quantization(config),
        dtype=dtype,
        weight_bytes=weight_bytes,
        held_bytes=sum(a.nbytes for a in arrays(model))
        + (0 if report is None else report.packed_bytes),
        load_s=time.monotonic() - began,
        kernels=kernels,
        batch_invariant=options.exact_batch or not _left(model),
        prefix_reuse_why="texts are computed whole",
        kind="reranker" if ranks else "embedder",
        embedding_size=0 if ranks else pooling.size(parsed.hidden_size),
        max_input_tokens=context,
        prefill_step_size=longest,
        prompts=prompts,
        default_prompt=default_prompt,
    )
    device = MLXMemory(budget_bytes(options.memory_budget, mx.device_info(), gpu))
    limits = _limits(context, longest, step_tokens)
    weights = weights_of(model, info.held_bytes, gpu)
    return LoadedModel(info, runner, limits, device=device, weights=weights)


def _limits(context: int, longest: int, step_tokens: int) -> Limits:
    """A sequence ends one token past its prompt, which is then as long as the context. Memory is no
    bound: there is no KV."""
    row_tokens = -(-(context + 1) // KV_BUCKET) * KV_BUCKET
    return Limits(
        max_num_seqs=MAX_TEXTS,
        prefill_step_size=longest,
        prefill_budget=step_tokens,
        context_length=context + 1,
        kv_capacity_tokens=MAX_TEXTS * row_tokens,
        kv_bucket_tokens=KV_BUCKET,
    )


def _parse(path: Path, config: dict[str, Any]) -> Parsed:
    file = path / "config.json"
    try:
        parsed = msgspec.convert(config, FAMILIES[config["model_type"]].config)
    except msgspec.ValidationError as error:
        raise ModelBroken(f"{file}: {error}") from error
    if (what := parsed.unknown()) is not None:
        raise ModelBroken(f"{file}: {what}: not known here")
    return parsed


def _load_weights(path: Path, parsed: Parsed, config: dict[str, Any], ranks: bool) -> TextEncoder:
    family = FAMILIES[parsed.model_type]
    try:
        stored: dict[str, Any] = {}
        for file in sorted(path.glob("model*.safetensors")):
            shard: Any = mx.load(str(file))
            stored |= shard
        weights = family.rename(stored, ranks)
        labels = weights["head.out.weight"].shape[0] if ranks else 0
        if labels > 1:
            raise ModelBroken(
                f"{path} sorts texts into {labels} classes; a reranker gives one score"
            )
        model = family.model(parsed, labels)
        if quantised := config.get("quantization"):
            quantize(
                model,
                quantised["group_size"],
                quantised["bits"],
                class_predicate=lambda name, _: f"{name}.scales" in weights,
            )
        model.load_weights(list(weights.items()))
    except ModelBroken:
        raise
    except MemoryError as e:
        raise ModelBroken(f"{path}: not enough memory for the weights") from e
    except Exception as e:
        raise failed(str(path), e) from e
    return model


def _use_kernels(model: TextEncoder, config: Parsed) -> None:
    """Native attention and activation, where they have the model's kind."""
    from mlx_serving.runtime.native import ops

    def attend(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
        # The kernel is causal. A query that is a head of its own and stands at the end sees all.
        texts, heads, length, dim = q.shape
        ends = mx.full((texts,), length - 1, dtype=mx.int32)
        lone = q.reshape(texts, heads * length, 1, dim)
        k, v = mx.contiguous(k), mx.contiguous(v)
        out = ops.attention(lone, k, v, mx.arange(texts, dtype=mx.int32), ends, scale)
        return out.reshape(q.shape)

    def gelu(x: mx.array) -> mx.array:
        return ops.gated(x, mx.ones_like(x), "gelu_erf")

    fits = config.hidden_size // config.num_attention_heads % 16 == 0
    model.use(attend if fits else None, gelu if config.hidden_act == "gelu" else None)


def _left(model: TextEncoder) -> bool:
    """Whether some product's rounding may depend on how many rows it has."""
    return any(type(m) in (Linear, QuantizedLinear) for _, m in model.named_modules())


def _warm_up(runner: EncoderRunner) -> None:
    texts = ((1,) * 2, (1,) * 3)
    starts = tuple(RowStart(i, i, t, len(t), SamplingParams()) for i, t in enumerate(texts))
    chunks = tuple(PrefillChunk(i, i, t, 0, samples=True) for i, t in enumerate(texts))
    try:
        runner.launch(StepPlan(0, starts=starts, prefill=chunks)).wait()
    except Exception as e:
        raise failed("the model cannot run", e) from e
    mx.clear_cache()
