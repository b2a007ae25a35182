"""What `show` asks a model's own code: prefix reuse, and the bytes of a token's KV."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_serving.catalog.jobs import describe as describe_in_a_job
from mlx_serving.errors import ModelBroken
from mlx_serving.runtime.describe import describe
from mlx_serving.worker.jobwire import Described
from model_folders import files, write_folder

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 32,
}
MAMBA = {
    "model_type": "mamba",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "state_size": 4,
    "num_hidden_layers": 2,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "time_step_rank": 2,
}


def made(folder: Path, config: dict[str, object]) -> Path:
    """A model of that config with the weights that it was born with."""
    from mlx.utils import tree_flatten
    from mlx_lm.utils import _get_classes

    folder.mkdir()
    model_class, args_class = _get_classes(config)
    weights = dict(tree_flatten(model_class(args_class.from_dict(config)).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_attention_alone_shares_blocks(tmp_path: Path) -> None:
    told = describe(made(tmp_path / "llama", LLAMA))
    assert told.prefix_reuse == "blocks"
    width = 2 if mx.default_device().type == mx.gpu else 4
    assert told.kv_bytes_per_token in (3 * 2 * 2 * 16 * width, 3 * 2 * 2 * 16 * 4)
    assert (told.state_bytes_per_row, told.batched) == (0, True)
    assert "KVCache" in told.why


def test_quantised_kv_is_told_or_why_there_is_none(tmp_path: Path) -> None:
    told = describe(made(tmp_path / "a", LLAMA | {"head_dim": 32}))
    assert list(told.kv_bytes_by_bits) == ["16", "8", "4", "k8v4"]
    assert all(0 < each <= told.kv_bytes_per_token for each in told.kv_bytes_by_bits.values())
    told = describe(made(tmp_path / "b", LLAMA))
    assert list(told.kv_bytes_by_bits) == ["16"] and "heads of 16 numbers" in told.kv_bits_why_not
    told = describe(made(tmp_path / "c", MAMBA))
    assert told.kv_bytes_by_bits == {} and "no attention" in told.kv_bits_why_not


def test_recurrent_layers_share_at_snapshots(tmp_path: Path) -> None:
    told = describe(made(tmp_path / "mamba", MAMBA))
    assert told.prefix_reuse == "snapshots"
    assert told.kv_bytes_per_token == 0
    assert told.state_bytes_per_row > 0


def test_models_without_a_shared_cache_say_why(tmp_path: Path) -> None:
    assert describe(write_folder(tmp_path / "a", files(model_type="scripted"))) == Described(
        prefix_reuse="none", why="it has no cache: its answers are written down"
    )
    assert "encoder" in describe(write_folder(tmp_path / "b", files(model_type="bert"))).why


def test_a_model_that_cannot_be_built_ends_the_job_alone(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", files(model_type="nobodys"))
    with pytest.raises(ModelBroken, match="nobodys") as caught:
        describe_in_a_job(folder)
    assert caught.value.code == "job_died"
