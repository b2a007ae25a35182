"""Text sides that are kept: which are read again, and which are not."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

import byte_vocabulary
from mlx_serving.content.text import Reading, TextSide
from mlx_serving.content.text_sides import TextSides
from mlx_serving.errors import ConfigError, ModelBroken


def folder(path: Path) -> Path:
    path.mkdir()
    byte_vocabulary.write(path, eos=0)
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "one"}))
    return path


def test_a_folder_is_read_once_until_it_changes(tmp_path: Path) -> None:
    sides, path = TextSides(), folder(tmp_path / "m")
    first = sides.load(path)
    assert sides.load(path) is first
    assert sides.load(folder(tmp_path / "other")) is not first
    (path / "model.safetensors").write_bytes(b"weights")
    assert sides.load(path) is first
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "another"}))
    second = sides.load(path)
    assert second is not first
    assert template(first) == "one" and template(second) == "another"
    (path / "chat_template.jinja").write_text("a file of its own")
    assert template(sides.load(path)) == "a file of its own"
    (path / "additional_chat_templates").mkdir()
    more = path / "additional_chat_templates" / "rag.jinja"
    more.write_text("rag")
    named = sides.load(path).template
    assert named is not None and named.sources["rag"] == "rag"
    more.write_text("longer rag")
    named = sides.load(path).template
    assert named is not None and named.sources["rag"] == "longer rag"
    os.unlink(path / "tokenizer.json")
    with pytest.raises(ModelBroken, match=r"tokenizer\.json"):
        sides.load(path)


def test_settings_are_part_of_it(tmp_path: Path) -> None:
    sides, path = TextSides(), folder(tmp_path / "m")
    file = tmp_path / "own.jinja"
    own = Reading(str(file))
    with pytest.raises(ConfigError, match=r"own\.jinja"):
        sides.load(path, own)
    file.write_text("mine")
    first = sides.load(path, own)
    assert template(first) == "mine"
    assert sides.load(path, Reading(str(file))) is first
    assert sides.load(path, replace(own, tool_parser="hermes")) is not first
    assert sides.load(path, replace(own, threads=False)) is not first
    assert sides.load(path) is not first
    file.write_text("mine, changed")
    assert template(sides.load(path, own)) == "mine, changed"


def test_the_last_few_are_kept(tmp_path: Path) -> None:
    sides = TextSides(most=2)
    paths = [folder(tmp_path / name) for name in "abc"]
    a, b = (sides.load(path) for path in paths[:2])
    assert sides.load(paths[0]) is a
    sides.load(paths[2])
    assert sides.load(paths[0]) is a, "it was used last"
    assert sides.load(paths[1]) is not b


def template(side: TextSide) -> str:
    assert side.template is not None
    return side.template.sources["default"]
