"""Tiny encoders with random weights, and a slow, obvious one in numpy to hold ours to."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

WORDS = [f"w{i}" for i in range(60)]
Arrays = dict[str, np.ndarray]


def config(family: str = "bert", **changes: Any) -> dict[str, Any]:
    roberta = family != "bert"
    return {
        "model_type": family,
        "architectures": ["BertModel" if family == "bert" else "XLMRobertaModel"],
        "vocab_size": 4 + len(WORDS),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 34 if roberta else 32,
        "type_vocab_size": 1 if roberta else 2,
        "layer_norm_eps": 1e-5,
        "hidden_act": "gelu",
        "pad_token_id": 1 if roberta else 0,
        **changes,
    }


def write(
    folder: Path,
    family: str = "bert",
    *,
    labels: int = 0,
    pooling: str | None = None,
    files: dict[str, Any] | None = None,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """A model folder. `pooling`: as sentence-transformers keeps it; `labels`: a classifier of so many;
    `files`: more JSON files, by path."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = config(family, **changes)
    if labels:
        settings["architectures"] = ["BertForSequenceClassification"]
        if family != "bert":
            settings["architectures"] = ["XLMRobertaForSequenceClassification"]
    extra = dict(files or {})
    if pooling is not None:
        steps = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
        extra["modules.json"] = [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(steps)
        ]
        extra["1_Pooling/config.json"] = {f"pooling_mode_{pooling}": True}
    for name, value in {"config.json": settings, **extra}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(value))
    (folder / "tokenizer.json").write_text(tokenizer_json(family))
    save(folder / "model.safetensors", weights(settings, labels, seed))
    return folder


def tokenizer_json(family: str) -> str:
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    if family != "bert":
        names = ["<s>", "<pad>", "</s>", "<unk>"]
    vocab = {word: i for i, word in enumerate([*names, *WORDS])}
    unknown = "[UNK]" if family == "bert" else "<unk>"
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    first, end = ("[CLS]", "[SEP]") if family == "bert" else ("<s>", "</s>")
    kind = 1 if family == "bert" else 0
    between = f"{end}:0" if family == "bert" else f"{end}:0 {end}:0"
    tokenizer.post_processor = TemplateProcessing(
        single=f"{first}:0 $A:0 {end}:0",
        pair=f"{first}:0 $A:0 {between} $B:{kind} {end}:{kind}",
        special_tokens=[(first, vocab[first]), (end, vocab[end])],
    )
    return tokenizer.to_str()


def weights(settings: dict[str, Any], labels: int, seed: int) -> Arrays:
    """Under Hugging Face's names, large enough that a text's vector depends on all of it."""
    rng = np.random.default_rng(seed)
    size, inner = settings["hidden_size"], settings["intermediate_size"]
    found: Arrays = {}

    def linear(name: str, inputs: int, outputs: int) -> None:
        found[f"{name}.weight"] = rng.normal(0, 1.2 / math.sqrt(inputs), (outputs, inputs))
        found[f"{name}.bias"] = rng.normal(0, 0.1, outputs)

    def norm(name: str) -> None:
        found[f"{name}.weight"] = 1 + rng.normal(0, 0.1, size)
        found[f"{name}.bias"] = rng.normal(0, 0.1, size)

    prefix = "" if not labels else ("bert." if settings["model_type"] == "bert" else "roberta.")
    for name, rows in (
        ("word_embeddings", settings["vocab_size"]),
        ("position_embeddings", settings["max_position_embeddings"]),
        ("token_type_embeddings", settings["type_vocab_size"]),
    ):
        found[f"{prefix}embeddings.{name}.weight"] = rng.normal(0, 1, (rows, size))
    found[f"{prefix}embeddings.position_ids"] = np.arange(settings["max_position_embeddings"])[None]
    norm(f"{prefix}embeddings.LayerNorm")
    for i in range(settings["num_hidden_layers"]):
        at = f"{prefix}encoder.layer.{i}"
        for part in ("query", "key", "value"):
            linear(f"{at}.attention.self.{part}", size, size)
        linear(f"{at}.attention.output.dense", size, size)
        norm(f"{at}.attention.output.LayerNorm")
        linear(f"{at}.intermediate.dense", size, inner)
        linear(f"{at}.output.dense", inner, size)
        norm(f"{at}.output.LayerNorm")
    if labels and prefix == "bert.":
        linear("bert.pooler.dense", size, size)
        linear("classifier", size, labels)
    elif labels:
        linear("classifier.dense", size, size)
        linear("classifier.out_proj", size, labels)
    else:
        linear("pooler.dense", size, size)  # stored, and of no use
    return {k: v.astype(np.float32 if v.dtype.kind == "f" else np.int64) for k, v in found.items()}


def save(file: Path, arrays: Arrays) -> None:
    header, at = {}, 0
    for name, array in arrays.items():
        kind = "F32" if array.dtype == np.float32 else "I64"
        end = at + array.nbytes
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    data = b"".join(array.tobytes() for array in arrays.values())
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def read(file: Path) -> Arrays:
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    data, kinds = raw[8 + length :], {"F32": np.float32, "I64": np.int64}
    return {
        name: np.frombuffer(
            data[slice(*entry["data_offsets"])], kinds[entry["dtype"]]
        ).reshape(entry["shape"])
        for name, entry in json.loads(raw[8 : 8 + length]).items()
        if name != "__metadata__"
    }  # fmt: skip


class Oracle:
    """One text at a time, in float64."""

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self._arrays = {
            name.removeprefix("bert.").removeprefix("roberta."): array.astype(np.float64)
            for name, array in read(folder / "model.safetensors").items()
        }

    def states(self, token_ids: list[int], type_ids: list[int] | None = None) -> np.ndarray:
        """`[tokens, hidden]`"""
        a, c = self._arrays, self.config
        start = 0 if c["model_type"] == "bert" else c["pad_token_id"] + 1
        positions = np.arange(len(token_ids)) + start
        x = a["embeddings.word_embeddings.weight"][token_ids]
        x = x + a["embeddings.position_embeddings.weight"][positions]
        x = x + a["embeddings.token_type_embeddings.weight"][type_ids or [0] * len(token_ids)]
        x = self._norm(x, "embeddings.LayerNorm")
        for i in range(c["num_hidden_layers"]):
            x = self._layer(x, f"encoder.layer.{i}")
        return x

    def score(self, token_ids: list[int], type_ids: list[int]) -> float:
        """The classifier's one logit."""
        first = self.states(token_ids, type_ids)[0]
        if self.config["model_type"] == "bert":
            return float(
                self._linear(np.tanh(self._linear(first, "pooler.dense")), "classifier")[0]
            )
        dense = np.tanh(self._linear(first, "classifier.dense"))
        return float(self._linear(dense, "classifier.out_proj")[0])

    def _layer(self, x: np.ndarray, at: str) -> np.ndarray:
        heads = self.config["num_attention_heads"]
        q, k, v = (
            self._linear(x, f"{at}.attention.self.{part}").reshape(len(x), heads, -1)
            for part in ("query", "key", "value")
        )
        mixed = np.empty_like(q)
        for h in range(heads):
            scores = q[:, h] @ k[:, h].T / math.sqrt(q.shape[-1])
            e = np.exp(scores - scores.max(-1, keepdims=True))
            mixed[:, h] = e / e.sum(-1, keepdims=True) @ v[:, h]
        out = self._linear(mixed.reshape(x.shape), f"{at}.attention.output.dense")
        x = self._norm(x + out, f"{at}.attention.output.LayerNorm")
        up = self._linear(x, f"{at}.intermediate.dense")
        act = up * 0.5 * (1 + np.vectorize(math.erf)(up / math.sqrt(2)))
        return self._norm(x + self._linear(act, f"{at}.output.dense"), f"{at}.output.LayerNorm")

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self._arrays[f"{name}.weight"].T + self._arrays[f"{name}.bias"]

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        y = (x - mean) / np.sqrt(variance + self.config["layer_norm_eps"])
        return y * self._arrays[f"{name}.weight"] + self._arrays[f"{name}.bias"]
