"""What may be asked of a conversion, and what comes of it: the real job on a model of a few bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from mlx_serving.catalog.conversion import Wish, check, convert
from mlx_serving.catalog.digests import expected, manifest
from mlx_serving.catalog.facts import read_facts
from mlx_serving.catalog.health import Broken, Healthy, Machine, examine
from mlx_serving.catalog.inventory import Place
from mlx_serving.catalog.progress import Silent
from mlx_serving.catalog.repair import repair
from mlx_serving.config import Config
from mlx_serving.errors import ConfigError, MLXServingError, ModelBroken
from model_folders import TOKENIZER, flip_last_byte

MACHINE = Machine(extras=frozenset(), model_bytes=1 << 30)
WIDTH = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of 8 layers in float32."""
    folder = tmp_path_factory.mktemp("source") / "tiny"
    folder.mkdir()
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": WIDTH,
        "num_hidden_layers": 8,
        "intermediate_size": WIDTH,
        "num_attention_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": 32,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }
    random = np.random.default_rng(0)
    weights = {"model.embed_tokens.weight": random.normal(size=(32, WIDTH))}
    weights["model.norm.weight"] = np.ones(WIDTH)
    for i in range(8):
        for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down"):  # fmt: skip
            weights[f"model.layers.{i}.{name}_proj.weight"] = random.normal(size=(WIDTH, WIDTH))
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{i}.{name}.weight"] = np.ones(WIDTH)
    save_file({k: v.astype(np.float32) for k, v in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return value


class Tally(Silent):
    def __init__(self) -> None:
        self.total = self.done = 0

    def start(self, task: str, total_bytes: int) -> None:
        self.total += total_bytes

    def advance(self, n: int) -> None:
        self.done += n


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def made(model: Path, home: Path) -> Path:
    """The model in 4 bits, in groups of 32."""
    tally = Tally()
    folder = convert(str(model), Wish(bits=4, group_size=32), Config(home=str(home)), tally)
    assert tally.done == tally.total > 0
    return folder


def test_quantised_and_back(model: Path, home: Path, made: Path) -> None:
    config = Config(home=str(home))
    assert made == home / "models" / "tiny-4bit"
    facts = read_facts(made, "x")
    assert facts.folder.quantization == "4-bit g32"
    assert facts.parameters == read_facts(model, "x").parameters
    assert examine(made, MACHINE) == Healthy()
    assert {file.name for file in facts.files} == {
        "config.json",
        "mlx_serving_manifest.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    }
    told = manifest(made)
    assert told is not None and told.job[-1] == str(model)
    assert set(expected(made)) == {made / "model.safetensors"}

    with pytest.raises(ModelBroken, match="quantised already") as caught:
        convert("tiny-4bit", Wish(bits=8), config, Silent())
    assert caught.value.code == "already_quantised"
    back = convert("tiny-4bit", Wish(dequantize=True, dtype="float16"), config, Silent(), name="f")
    assert config_of(back).get("quantization") is None
    facts = read_facts(back, "f")
    assert (facts.folder.dtype, facts.folder.quantization) == ("float16", None)
    assert sorted(p.name for p in (home / "models").iterdir()) == ["f", "tiny-4bit"]


def test_a_broken_conversion_is_made_again(home: Path, made: Path) -> None:
    whole = (made / "model.safetensors").read_bytes()
    flip_last_byte(made / "model.safetensors")
    place = Place(name=made.name, source="converted", path=made)
    before, after = repair(place, MACHINE, home, Silent(), offline=True)
    assert isinstance(before, Broken) and before.problems[0].kind == "wrong_hash"
    assert after == Healthy()
    assert (made / "model.safetensors").read_bytes() == whole
    assert not [p.name for p in made.parent.iterdir() if p.name.startswith(".")]


def test_a_mixed_recipe(model: Path, tmp_path: Path) -> None:
    made = convert(str(model), Wish(recipe="mixed_4_6"), Config(home=str(tmp_path)), Silent())
    assert made.name == "tiny-mixed-4-6"
    assert read_facts(made, "x").folder.quantization == "4+6-bit g64"


def test_what_fails_leaves_nothing(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("model.safetensors", "tokenizer.json"):
        (broken / name).symlink_to(model / name)
    (broken / "config.json").write_text(json.dumps(config_of(model) | {"hidden_size": 128}))
    with pytest.raises(ModelBroken):
        convert(str(broken), Wish(bits=4), Config(home=str(tmp_path / "home")), Silent())
    assert not list((tmp_path / "home" / "models").glob("*"))


@pytest.mark.parametrize(
    ("wish", "flag"),
    [
        (Wish(bits=7), "--bits"),
        (Wish(group_size=48), "--group-size"),
        (Wish(mode="int4"), "--mode"),
        (Wish(recipe="mixed_1_2"), "--recipe"),
        (Wish(dtype="int8"), "--dtype"),
        (Wish(recipe="mixed_4_6", bits=4), "--bits"),
        (Wish(recipe="mixed_4_6", mode="mxfp4"), "--mode"),
        (Wish(mode="mxfp4", bits=4), "--mode"),
    ],
)
def test_what_cannot_be_asked_names_its_flag(wish: Wish, flag: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(wish)
    assert caught.value.param == flag


@pytest.mark.parametrize(
    ("wish", "name"), [(Wish(), None), (Wish(bits=4), "../up"), (Wish(bits=4), "there")]
)
def test_a_target_that_cannot_be_is_refused_before_any_work(
    model: Path, tmp_path: Path, wish: Wish, name: str | None
) -> None:
    (tmp_path / "models" / "there").mkdir(parents=True)
    with pytest.raises(MLXServingError):
        convert(str(model), wish, Config(home=str(tmp_path)), Silent(), name=name)


@pytest.mark.parametrize(
    ("wish", "suffix"),
    [
        (Wish(bits=8), "8bit"),
        (Wish(group_size=32), "4bit"),
        (Wish(recipe="mixed_3_6"), "mixed-3-6"),
        (Wish(mode="mxfp4"), "mxfp4"),
        (Wish(dequantize=True), "floats"),
        (Wish(dtype="bfloat16"), "bfloat16"),
    ],
)
def test_names_say_how(wish: Wish, suffix: str) -> None:
    assert wish.suffix() == suffix
