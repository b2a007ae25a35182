from __future__ import annotations

from pathlib import Path

import pytest

from mlx_serving.api.keys import Key, Keyring, load_keys
from mlx_serving.config import Config
from mlx_serving.errors import ConfigError
from mlx_serving.secret import hashed
from mlx_serving.traffic.allowance import Limits
from mlx_serving.types import Priority

HASH = hashed("of-ci")


def written(folder: Path, text: str) -> Config:
    file = folder / "keys.yaml"
    file.write_text(text)
    return Config(api_keys_file=str(file))


def test_a_file_of_keys(tmp_path: Path) -> None:
    (tmp_path / "bob").write_text("of-bob\n")
    config = written(
        tmp_path,
        f"""
keys:
  - name: ci
    hash: {HASH}
    models: [tiny, "qwen*"]
    max_concurrent: 4
    requests_per_min: 60
    tokens_per_min: 1000
    priority: low
  - name: ann
    key_env: ANN
    share_cache: true
  - name: bob
    key_file: bob
""",
    )
    keyring = load_keys(config, {"ANN": "of-ann"})
    ci = keyring.find("of-ci")
    assert ci == Key(
        name="ci",
        hash=HASH,
        models=("tiny", "qwen*"),
        limits=Limits(4, 60, 1000),
        priority=Priority.LOW,
    )
    assert ci.allows("qwen3-0.6b") and not ci.allows("smollm2")
    ann, bob = keyring.find("of-ann"), keyring.find("of-bob")
    assert ann is not None and bob is not None
    assert ann.share_cache and ann.allows("anything") and not bob.share_cache


def test_a_hash_does_not_open() -> None:
    keyring = load_keys(Config(api_key=(HASH, "plain"), admin_key="root"))
    assert keyring.find("of-ci") and keyring.find("plain")
    assert keyring.find(HASH) is None
    assert keyring.find("") is None and keyring.find("plai") is None
    assert keyring.is_admin("root") and not keyring.is_admin(hashed("root"))
    assert not Keyring().is_admin("")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("keys: []", "length"),
        ("", "object"),
        ("keys: {", "line 1"),
        ("keys: [{name: ci}]", "exactly one"),
        (f"keys: [{{name: ci, hash: {HASH}, key_env: X}}]", "exactly one"),
        ("keys: [{name: ci, hash: 'sha256:short'}]", "hash"),
        ("keys: [{name: 'a b', key_env: X}]", "name"),
        ("keys: [{name: ci, key_env: NOT_SET}]", "NOT_SET"),
        ("keys: [{name: ci, key_file: none}]", "none"),
        ("keys: [{name: ci, key_env: X, max_concurrent: 0}]", "max_concurrent"),
        ("keys: [{name: ci, key_env: X, priority: soon}]", "priority"),
        ("keys: [{name: ci, key_env: X, limit: 3}]", "limit"),
        ("keys: [{name: ci, key_env: X}, {name: ci, key_env: Y}]", "Two API keys"),
        ("keys: [{name: a, key_env: X}, {name: b, key_env: X}]", "same key"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str, names: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_keys(written(tmp_path, text), {"X": "key-of-x", "Y": "key-of-y"})
    assert names in caught.value.message
    assert "key-of" not in caught.value.message


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_keys(Config(api_keys_file=str(tmp_path / "none")))


def test_the_admin_key_is_nobody_else_s() -> None:
    with pytest.raises(ConfigError, match="same key"):
        load_keys(Config(api_key=("one",), admin_key="one"))
