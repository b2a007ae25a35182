"""Tiny ModernBERT and nomic-bert models with random weights, and slow, obvious ones in numpy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

import encoders
from encoders import Arrays

SIZE, HEADS, INNER, LAYERS, VOCAB = 32, 2, 48, 4, 4 + len(encoders.WORDS)


def config(family: str, **changes: Any) -> dict[str, Any]:
    if family == "modernbert":
        base: dict[str, Any] = {
            "architectures": ["ModernBertModel"],
            "hidden_size": SIZE,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "intermediate_size": INNER,
            "max_position_embeddings": 40,
            "norm_eps": 1e-5,
            "hidden_activation": "gelu",
            "global_attn_every_n_layers": 3,
            "local_attention": 8,
            "global_rope_theta": 160000.0,
            "local_rope_theta": 10000.0,
        }
    else:
        base = {
            "architectures": ["NomicBertModel"],
            "n_embd": SIZE,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_inner": INNER,
            "n_positions": 40,
            "layer_norm_epsilon": 1e-5,
            "activation_function": "swiglu",
            "rotary_emb_base": 1000,
            "type_vocab_size": 2,
        }
    return {"model_type": family, "vocab_size": VOCAB, **base, **changes}


def write(folder: Path, family: str, *, labels: int = 0, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if labels:
        names = {"modernbert": "ModernBert", "nomic_bert": "NomicBert"}
        changes["architectures"] = [f"{names[family]}ForSequenceClassification"]
    settings = config(family, **changes)
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").write_text(encoders.tokenizer_json("bert"))
    make = modern_weights if family == "modernbert" else nomic_weights
    encoders.save(folder / "model.safetensors", make(settings, labels))
    return folder


class _Random:
    def __init__(self) -> None:
        self._rng = np.random.default_rng(7)
        self.found: Arrays = {}

    def matrix(self, name: str, outputs: int, inputs: int) -> None:
        scale = 1.2 / math.sqrt(inputs)
        self.found[f"{name}.weight"] = self._rng.normal(0, scale, (outputs, inputs)).astype("f")

    def table(self, name: str, rows: int) -> None:
        self.found[f"{name}.weight"] = self._rng.normal(0, 1, (rows, SIZE)).astype("f")

    def norm(self, name: str, *, bias: bool) -> None:
        self.found[f"{name}.weight"] = (1 + self._rng.normal(0, 0.1, SIZE)).astype("f")
        if bias:
            self.bias(name, SIZE)

    def bias(self, name: str, size: int) -> None:
        self.found[f"{name}.bias"] = self._rng.normal(0, 0.1, size).astype("f")


def modern_weights(settings: dict[str, Any], labels: int) -> Arrays:
    """As a cross-encoder's are named, with `model.`, or as an embedder's."""
    w, prefix = _Random(), "model." if labels else ""
    w.table(f"{prefix}embeddings.tok_embeddings", VOCAB)
    w.norm(f"{prefix}embeddings.norm", bias=False)
    for i in range(settings["num_hidden_layers"]):
        at = f"{prefix}layers.{i}"
        if i:
            w.norm(f"{at}.attn_norm", bias=False)
        w.matrix(f"{at}.attn.Wqkv", 3 * SIZE, SIZE)
        w.matrix(f"{at}.attn.Wo", SIZE, SIZE)
        w.norm(f"{at}.mlp_norm", bias=False)
        w.matrix(f"{at}.mlp.Wi", 2 * INNER, SIZE)
        w.matrix(f"{at}.mlp.Wo", SIZE, INNER)
    w.norm(f"{prefix}final_norm", bias=False)
    w.matrix("head.dense", SIZE, SIZE)
    w.norm("head.norm", bias=False)
    if labels:
        w.matrix("classifier", labels, SIZE)
        w.bias("classifier", labels)
    return w.found


def nomic_weights(settings: dict[str, Any], labels: int) -> Arrays:
    """As a cross-encoder's are named, with `bert.`, or as an embedder's."""
    w, prefix = _Random(), "bert." if labels else ""
    w.table(f"{prefix}embeddings.word_embeddings", VOCAB)
    w.table(f"{prefix}embeddings.token_type_embeddings", settings["type_vocab_size"])
    w.norm(f"{prefix}emb_ln", bias=True)
    for i in range(settings["n_layer"]):
        at = f"{prefix}encoder.layers.{i}"
        w.matrix(f"{at}.attn.Wqkv", 3 * SIZE, SIZE)
        w.matrix(f"{at}.attn.out_proj", SIZE, SIZE)
        w.norm(f"{at}.norm1", bias=True)
        for part in ("fc11", "fc12"):
            w.matrix(f"{at}.mlp.{part}", INNER, SIZE)
        w.matrix(f"{at}.mlp.fc2", SIZE, INNER)
        w.norm(f"{at}.norm2", bias=True)
    if labels:
        for name, size in (("bert.pooler.dense", SIZE), ("classifier", labels)):
            w.matrix(name, size, SIZE)
            w.bias(name, size)
    return w.found


class Oracle:
    """One text at a time, a token and a head at a time where that is clearer, in float64."""

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self._modern = self.config["model_type"] == "modernbert"
        self._arrays = {
            name.removeprefix("model.")
            .removeprefix("bert.")
            .removeprefix("encoder."): array.astype(np.float64)
            for name, array in encoders.read(folder / "model.safetensors").items()
        }

    def states(self, token_ids: list[int], type_ids: list[int] | None = None) -> np.ndarray:
        """`[tokens, hidden]`"""
        if self._modern:
            x = self._norm(
                self._arrays["embeddings.tok_embeddings.weight"][token_ids], "embeddings.norm"
            )
            for i in range(self.config["num_hidden_layers"]):
                x = self._modern_layer(x, i)
            return self._norm(x, "final_norm")
        x = self._arrays["embeddings.word_embeddings.weight"][token_ids]
        kinds = type_ids or [0] * len(token_ids)
        x = x + self._arrays["embeddings.token_type_embeddings.weight"][kinds]
        x = self._norm(x, "emb_ln")
        for i in range(self.config["n_layer"]):
            x = self._nomic_layer(x, f"layers.{i}")
        return x

    def score(self, token_ids: list[int]) -> float:
        """The classifier's one logit."""
        states = self.states(token_ids)
        if not self._modern:
            return float(
                self._biased(np.tanh(self._biased(states[0], "pooler.dense")), "classifier")[0]
            )
        mean = self.config.get("classifier_pooling") == "mean"
        pooled = states.mean(0) if mean else states[0]
        x = self._norm(_gelu(self._linear(pooled, "head.dense")), "head.norm")
        return float(self._biased(x, "classifier")[0])

    def _modern_layer(self, x: np.ndarray, i: int) -> np.ndarray:
        c, at = self.config, f"layers.{i}"
        everything = i % c["global_attn_every_n_layers"] == 0
        theta = c["global_rope_theta"] if everything else c["local_rope_theta"]
        window = len(x) if everything else c["local_attention"] // 2
        normed = x if i == 0 else self._norm(x, f"{at}.attn_norm")
        x = x + self._linear(self._attention(normed, at, theta, window), f"{at}.attn.Wo")
        both = self._linear(self._norm(x, f"{at}.mlp_norm"), f"{at}.mlp.Wi")
        return x + self._linear(_gelu(both[:, :INNER]) * both[:, INNER:], f"{at}.mlp.Wo")

    def _nomic_layer(self, x: np.ndarray, at: str) -> np.ndarray:
        mixed = self._attention(x, at, self.config["rotary_emb_base"], len(x))
        x = self._norm(x + self._linear(mixed, f"{at}.attn.out_proj"), f"{at}.norm1")
        gate = self._linear(x, f"{at}.mlp.fc12")
        inner = self._linear(x, f"{at}.mlp.fc11") * gate / (1 + np.exp(-gate))
        return self._norm(x + self._linear(inner, f"{at}.mlp.fc2"), f"{at}.norm2")

    def _attention(self, x: np.ndarray, at: str, theta: float, window: int) -> np.ndarray:
        qkv = self._linear(x, f"{at}.attn.Wqkv").reshape(len(x), 3, HEADS, SIZE // HEADS)
        mixed = np.zeros((len(x), HEADS, SIZE // HEADS))
        for h in range(HEADS):
            q = [_turn(qkv[t, 0, h], t, theta) for t in range(len(x))]
            k = [_turn(qkv[t, 1, h], t, theta) for t in range(len(x))]
            for t in range(len(x)):
                seen = [s for s in range(len(x)) if abs(s - t) <= window]
                weights = np.exp([q[t] @ k[s] / math.sqrt(SIZE // HEADS) for s in seen])
                for s, weight in zip(seen, weights / weights.sum(), strict=True):
                    mixed[t, h] += weight * qkv[s, 2, h]
        return mixed.reshape(x.shape)

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self._arrays[f"{name}.weight"].T

    def _biased(self, x: np.ndarray, name: str) -> np.ndarray:
        return self._linear(x, name) + self._arrays[f"{name}.bias"]

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return y * self._arrays[f"{name}.weight"] + self._arrays.get(f"{name}.bias", 0.0)


def _turn(x: np.ndarray, position: int, theta: float) -> np.ndarray:
    """Each pair (i, i + half) as a complex number, turned by its own angle."""
    half = len(x) // 2
    angles = position * theta ** (-np.arange(half) / half)
    turned = (x[:half] + 1j * x[half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag])


def _gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
