"""Entries of `models` with settings of their own: how they are read, and what they do when served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlx_serving import Engine
from mlx_serving.config import FIELDS, Config
from mlx_serving.config_sources import load, override
from mlx_serving.errors import ConfigError
from mlx_serving.model_entry import ENTRY_FIELDS, PER_MODEL, ModelEntry, WarmUpChat
from mlx_serving.models import _options

SERVE = """\
kernels: f32
keep_alive_s: 60
models:
  - plain
  - model: ./weights
    name: fast
    aliases: [quick, "fast-*"]
    pinned: yes
    kernels: fast
    max_num_seqs: 4
    context_length: 2048
    prefix_cache_bytes: 0
    warm_up:
      - Hello
      - system: Be brief.
      - {system: Be kind., user: "Hi"}
"""

MISTAKES = """\
models:
  - name: nameless
  - model: a
    kernels: fastest
    kernal: fast
    port: 1
    max_num_seqs: 0
    name: x
    name: y
    pinned: [a]
    warm_up: [{sytem: a}]
  - [a]
"""


def write(folder: Path, text: str) -> str:
    path = folder / "serve.yaml"
    path.write_text(text)
    return str(path)


def mistakes(text: str, tmp_path: Path, **flags: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(flags, env={}, file=write(tmp_path, text))
    return caught.value.message.replace(f"{tmp_path}/", "").splitlines()


def test_an_entry_has_settings_of_its_own(tmp_path: Path) -> None:
    got = load(env={}, file=write(tmp_path, SERVE))
    plain, fast = got.entries
    assert plain == ModelEntry(model="plain")
    assert (fast.model, fast.name, fast.pinned) == ("./weights", "fast", True)
    assert fast.aliases == ("quick", "fast-*")
    brief, kind = WarmUpChat(system="Be brief."), WarmUpChat(system="Be kind.", user="Hi")
    assert fast.warm_up == ("Hello", brief, kind)
    assert (got.of(plain).kernels, got.of(plain).max_num_seqs) == ("f32", 16)
    own = got.of(fast)
    assert (own.kernels, own.max_num_seqs, own.context_length) == ("fast", 4, 2048)
    assert (own.prefix_cache_bytes, own.keep_alive_s) == (0, 60.0)


def test_an_entrys_setting_is_the_models_whatever_a_flag_says_for_all(tmp_path: Path) -> None:
    got = load({"kernels": "off"}, env={}, file=write(tmp_path, SERVE))
    assert [got.of(entry).kernels for entry in got.entries] == ["off", "fast"]


def test_models_of_a_flag_replace_the_files_with_their_settings(tmp_path: Path) -> None:
    got = load({"models": ["./weights"]}, env={}, file=write(tmp_path, SERVE))
    assert got.models == ("./weights",) and got.of(got.entries[0]).kernels == "f32"


def test_each_mistake_is_named_with_its_place(tmp_path: Path) -> None:
    choices = "expected one of auto, exact, fast, f32, off, got 'fastest'"
    assert mistakes(MISTAKES.replace("  - [a]\n", ""), tmp_path) == [
        "serve.yaml:9: key 'models[1].name' is already on line 8",
        "serve.yaml:2: models[0]: 'model' is missing",
        f"serve.yaml:4: models[1].kernels: {choices}",
        "serve.yaml:5: models[1].kernal: unknown key (did you mean 'kernels'?)",
        "serve.yaml:6: models[1].port: it is set for the whole server, not for one model",
        "serve.yaml:7: models[1].max_num_seqs: must be >= 1, got 0",
        "serve.yaml:10: models[1].pinned: expected true or false, got a list",
        "serve.yaml:11: models[1].warm_up: expected a list of texts, or of system and user, "
        "got [{'sytem': 'a'}]",
    ]
    assert mistakes("models:\n  - [a]\n", tmp_path) == [
        "serve.yaml:1: models: [0]: expected a model, or 'key: value' lines"
    ]
    assert mistakes("models:\n  - model:\n", tmp_path) == [
        "serve.yaml:2: models[0].model: expected text, got null"
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("models: [a, {model: a}]", "serve.yaml:1: models: a model is given twice"),
        (
            "models: [{model: a, name: x}, {model: b, name: x}]",
            "serve.yaml:1: models: a model is given twice",
        ),
        (
            "models: [{model: a, name: x}]\nserved_model_name: y",
            "serve.yaml:2: served_model_name: entries of models have names of their own",
        ),
        (
            "models: [a, {model: b, kv_disk_path: /d, prefix_cache_bytes: 0}]",
            "serve.yaml:1: models[1].kv_disk_path: needs a prefix cache in memory, "
            "and prefix_cache_bytes is 0",
        ),
    ],
)
def test_settings_that_are_not_possible_together(text: str, reason: str, tmp_path: Path) -> None:
    assert mistakes(text, tmp_path) == [reason]


def test_a_program_gives_entries_as_mappings() -> None:
    got = override(Config(), {"models": ["a", {"model": "a", "name": "b", "max_itl_ms": 5}]})
    assert got.models == ("a", ModelEntry(model="a", name="b", settings={"max_itl_ms": 5.0}))
    with pytest.raises(ConfigError) as caught:
        override(Config(), {"models": [{"model": "a", "max_num_seqs": "4", "aliases": "x"}]})
    assert caught.value.message.splitlines() == [
        "models[0].aliases: expected a list of texts, got 'x'",
    ]


def test_what_is_a_models_own_reaches_its_worker() -> None:
    """`PER_MODEL` names settings, none of them shadows a key, and the worker's are all among them."""
    assert FIELDS.keys() >= PER_MODEL and not ENTRY_FIELDS.keys() & FIELDS.keys()
    worker = set(_options(ModelEntry(model="m"), Config(), Path()).__struct_fields__)
    own = {"tokenizer_path", "memory_budget", "slow_step_ms", "unprepared", "adapter_of"}
    assert worker - PER_MODEL == own


async def test_the_same_files_are_served_twice_under_different_settings(scripted: Any) -> None:
    folder = str(scripted(mode="hash", context=512))
    models = [
        {"model": folder, "name": "long", "aliases": ["wide-*", "wide"]},
        {"model": folder, "name": "short", "context_length": 64, "pinned": True},
        {"model": folder, "prefill_step_size": 8, "keep_alive_s": 1000},
    ]
    async with Engine(models, prefill_step_size=16) as engine:
        served = {model.id: model for model in engine.gateway.models()}
        assert [m.context_length for m in served.values()] == [512, 64, 512]
        assert [m.pinned for m in served.values()] == [False, True, False]
        assert [m.expires_in_s is None for m in served.values()] == [True, True, False]
        infos = [engine.gateway.model_info(name) for name in served]
        assert [info and info.prefill_step_size for info in infos] == [16, 16, 8]
        assert engine.gateway.model_id("wide-open") == "long"
        assert "wide" in served["long"].aliases and "wide-*" not in served["long"].aliases
        # The model's own name is the entry's that has no other; the folder's path the first one's.
        assert list(served) == ["long", "short", "scripted"]
        assert engine.gateway.model_id("scripted") == "scripted"
        assert engine.gateway.model_id(folder) == "long"
        answers = [
            await engine.complete("Hello", model=m, max_tokens=8, temperature=0) for m in served
        ]
        assert len({answer.text for answer in answers}) == 1


def test_adapters_are_a_mapping_or_a_list(tmp_path: Path) -> None:
    named = "models:\n  - model: m\n    adapters:\n      fr: ./fr\n      sql: org/sql\n"
    listed = "models:\n  - model: m\n    adapters: [fr=./fr, sql=org/sql]\n"
    read = [load({}, env={}, file=write(tmp_path, text)).entries[0] for text in (named, listed)]
    assert read[0] == read[1] and read[0].adapters == ("fr=./fr", "sql=org/sql")
    wrong = "models:\n  - model: m\n    adapters: {a+b: x}\n"
    (line,) = mistakes(wrong, tmp_path)
    assert line.endswith("[0].adapters: expected NAME=FOLDER, got 'a+b=x'")
    assert load({"adapter": ["n+fr=./fr"]}, env={}).adapter == ("n+fr=./fr",)
    assert load({}, env={"MLX_SERVING_ADAPTER": "fr=a,de=b"}).adapter == ("fr=a", "de=b")
