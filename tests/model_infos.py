"""What a worker might say of a model, where a test is about one or two things of it."""

from __future__ import annotations

from typing import Any

from mlx_serving.types import ModelInfo


def model_info(model_id: str = "m", **known: Any) -> ModelInfo:
    rest: dict[str, Any] = {
        "path": "",
        "architecture": "",
        "context_length": 1,
        "vocab_size": 1,
        "eos_token_ids": (),
    }
    return ModelInfo(model_id=model_id, **(rest | known))
