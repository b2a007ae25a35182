"""Which API keys there are: from `--api-key`, `--api-keys-file` and `--admin-key`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from mlx_serving.config import Config
from mlx_serving.errors import ConfigError
from mlx_serving.live import Apply
from mlx_serving.secret import hashed, is_hash, is_name, same
from mlx_serving.traffic.allowance import Limits
from mlx_serving.types import MAX_WEIGHT, Priority

PriorityName = Literal["critical", "high", "normal", "low"]
Count = Annotated[int, Meta(ge=1)]


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """One API key and what it allows."""

    name: str
    hash: str
    models: tuple[str, ...] = ()
    """Names or patterns of models; none: all of them."""
    limits: Limits = Limits()
    priority: Priority | None = None
    share_cache: bool = False
    weight: float = 1.0
    """Its share of the tokens beside other keys' where there is not enough for all."""

    def allows(self, model: str) -> bool:
        return not self.models or any(fnmatchcase(model, pattern) for pattern in self.models)


class Keyring:
    """Every key. Without one the server is open."""

    def __init__(self, keys: Sequence[Key] = (), admin_hash: str | None = None) -> None:
        self.keys = keys
        self.admin_hash = admin_hash

    def prepare(self, wanted: Config) -> Apply:
        """See `live.Prepare`: requests that come later need one of the new keys; the file is read again."""
        found = load_keys(wanted)

        async def apply() -> tuple[str, ...]:
            alike = (found.keys, found.admin_hash) == (self.keys, self.admin_hash)
            self.keys, self.admin_hash = found.keys, found.admin_hash
            return () if alike or wanted.api_keys_file is None else ("api_keys_file",)

        return apply

    def find(self, presented: str) -> Key | None:
        """The key that `presented` is; every key is looked at, whichever it is."""
        candidate, found = hashed_as_given(presented), None
        for key in self.keys:
            if same(candidate, key.hash):
                found = key
        return found

    def is_admin(self, presented: str) -> bool:
        return self.admin_hash is not None and same(hashed_as_given(presented), self.admin_hash)


def hashed_as_given(presented: str) -> str:
    """A client's key is always hashed: knowing a stored hash must not be enough."""
    return hashed("" if is_hash(presented) else presented)


def load_keys(config: Config, env: Mapping[str, str] = os.environ) -> Keyring:
    """Raises ConfigError, naming the file and the entry."""
    keys = [
        Key(name=f"api-key-{number}", hash=hashed(text))
        for number, text in enumerate(config.api_key, 1)
    ]
    if config.api_keys_file is not None:
        keys += _read(Path(config.api_keys_file), env)
    admin = None if config.admin_key is None else hashed(config.admin_key)
    _distinct(keys, admin)
    return Keyring(keys, admin)


def _distinct(keys: Sequence[Key], admin: str | None) -> None:
    names: set[str] = set()
    hashes = {admin: "admin-key"}
    for key in keys:
        if key.name in names:
            raise ConfigError(f"Two API keys are named '{key.name}'.", param="api_keys_file")
        if other := hashes.get(key.hash):
            raise ConfigError(f"'{key.name}' and '{other}' are the same key.", param="api_key")
        names.add(key.name)
        hashes[key.hash] = key.name


# ------------------------------------------------------------------- the file


class _Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    hash: str | None = None
    key_env: Annotated[str, Meta(min_length=1)] | None = None
    key_file: Annotated[str, Meta(min_length=1)] | None = None
    models: tuple[Annotated[str, Meta(min_length=1)], ...] = ()
    max_concurrent: Count | None = None
    requests_per_min: Count | None = None
    tokens_per_min: Count | None = None
    priority: PriorityName | None = None
    share_cache: bool = False
    weight: Annotated[float, Meta(gt=0, le=MAX_WEIGHT)] = 1.0


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    keys: Annotated[tuple[_Entry, ...], Meta(min_length=1)]


def _read(path: Path, env: Mapping[str, str]) -> list[Key]:
    import yaml  # 60 ms

    def wrong(what: str) -> ConfigError:
        return ConfigError(f"{path}: {what}", param="api_keys_file")

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        entries = msgspec.convert(found, _File).keys
    except OSError as error:
        raise wrong(f"the API keys cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise wrong("not UTF-8 text") from None
    except yaml.YAMLError as error:
        raise wrong(" ".join(str(error).split())) from None
    except msgspec.ValidationError as error:
        raise wrong(str(error)) from None
    keys: list[Key] = []
    for entry in entries:
        try:
            keys.append(_key(entry, path.parent, env))
        except ValueError as error:
            raise wrong(f"key '{entry.name}': {error}") from None
    return keys


def _key(entry: _Entry, folder: Path, env: Mapping[str, str]) -> Key:
    """Raises ValueError where the entry does not say which key it is."""
    if not is_name(entry.name):
        raise ValueError("a name has 1 to 64 letters, digits and ._-")
    return Key(
        name=entry.name,
        hash=_hash(entry, folder, env),
        models=entry.models,
        limits=Limits(entry.max_concurrent, entry.requests_per_min, entry.tokens_per_min),
        priority=None if entry.priority is None else Priority[entry.priority.upper()],
        share_cache=entry.share_cache,
        weight=entry.weight,
    )


def _hash(entry: _Entry, folder: Path, env: Mapping[str, str]) -> str:
    match entry:
        case _Entry(hash=str(text), key_env=None, key_file=None):
            if not is_hash(text):
                raise ValueError("hash must be 'sha256:' and 64 hexadecimal digits")
            return text
        case _Entry(hash=None, key_env=str(name), key_file=None):
            if not env.get(name):
                raise ValueError(f"the variable {name} is not set")
            return hashed(env[name])
        case _Entry(hash=None, key_env=None, key_file=str(name)):
            try:
                text = (folder / name).read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"{folder / name}: {error}") from None
            if not text:
                raise ValueError(f"{folder / name} is empty")
            return hashed(text)
        case _:
            raise ValueError("exactly one of hash, key_env and key_file must be given")
