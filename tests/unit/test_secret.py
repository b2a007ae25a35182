from __future__ import annotations

import hashlib

import pytest

from mlx_serving.config import Config
from mlx_serving.config_sources import load, override
from mlx_serving.errors import ConfigError
from mlx_serving.secret import hashed, is_hash, new_key, same


def test_a_hash_is_sha256_and_stays_one() -> None:
    digest = "sha256:" + hashlib.sha256(b"secret").hexdigest()
    assert hashed("secret") == digest
    assert hashed(digest) == digest
    assert is_hash(digest) and not is_hash("sha256:abc") and not is_hash(digest + "\n")
    assert same(digest, hashed("secret")) and not same(digest, hashed("Secret"))


def test_keys_are_not_alike() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100 and all(len(key) > 40 for key in keys)


def test_settings_hold_hashes_only() -> None:
    env = {"MLX_SERVING_API_KEY": "one,two", "MLX_SERVING_ADMIN_KEY": "three"}
    config = load(env=env)
    assert config.api_key == (hashed("one"), hashed("two"))
    assert config.admin_key == hashed("three")
    assert load({"api_key": ["four"]}, env=env).api_key == (hashed("four"),)
    assert override(Config(), {"api_key": ("one",)}).api_key == (hashed("one"),)
    assert load(env={}).admin_key is None


def test_a_wrong_secret_is_not_repeated() -> None:
    with pytest.raises(ConfigError) as caught:
        override(Config(), {"api_key": (12345,)})
    assert "12345" not in caught.value.message
