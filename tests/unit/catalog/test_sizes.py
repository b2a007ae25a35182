"""Sizes that no model can have: zero, negative, missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlx_serving.catalog.health import Broken, Machine, describe, examine
from mlx_serving.catalog.sizes import check_sizes
from model_folders import CONFIG, files, write_folder

GONE = object()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"num_attention_heads": 0}, ["num_attention_heads is 0, which is no size"]),
        ({"hidden_size": -8, "head_dim": "x"}, ["hidden_size is -8, which is no size", 'head_dim is "x", which is no size']),
        ({"vocab_size": True}, ["vocab_size is true, which is no size"]),
        ({"num_key_value_heads": None, "head_dim": None}, []),
        ({"num_key_value_heads": [1, 2]}, []),
        ({"hidden_size": GONE, "rms_norm_eps": GONE}, ["has no hidden_size, rms_norm_eps"]),
        ({"num_hidden_layers": None}, ["has no num_hidden_layers"]),
        # Nobody reads it.
        ({"n_head": 0}, []),
        ({"model_type": "mamba", "num_attention_heads": 0, **dict.fromkeys(("intermediate_size", "state_size", "conv_kernel", "use_bias", "use_conv_bias", "time_step_rank"), 1)}, []),
        # By another name in mlx-lm.
        ({"model_type": "mistral", "num_attention_heads": 0}, ["num_attention_heads is 0, which is no size"]),
        # Ours, and one that nobody knows: nothing tells what they need.
        ({"model_type": "bert", "hidden_size": 0}, ["hidden_size is 0, which is no size"]),
        ({"model_type": "nobodys", "hidden_size": GONE}, []),
        ({"model_type": "gemma3", "text_config": {"num_attention_heads": 0}}, ["text_config.num_attention_heads is 0, which is no size"]),
    ],
)  # fmt: skip
def test_sizes(changes: dict[str, Any], said: list[str]) -> None:
    config = {key: value for key, value in (CONFIG | changes).items() if value is not GONE}
    assert [problem.detail for problem in check_sizes(config)] == said


def test_a_folder_with_a_wrong_size_is_broken_by_name(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", files(num_attention_heads=0))
    verdict = examine(folder, Machine(extras=frozenset(), model_bytes=1 << 30))
    assert isinstance(verdict, Broken)
    assert describe(verdict)[1] == "config.json: num_attention_heads is 0, which is no size"
