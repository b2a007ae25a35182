"""API keys as they are kept: by their hash. What can be read back is never stored or shown.

A plain SHA-256 is enough for keys drawn at random (`new_key`): there is nothing to guess.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets

PREFIX = "sha256:"
_HASH = re.compile(r"sha256:[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


def new_key() -> str:
    """A key of 256 random bits."""
    return "sk-ms-" + secrets.token_urlsafe(32)


def hashed(key: str) -> str:
    """`sha256:` and 64 hexadecimal digits. What has that form already stays."""
    return key if is_hash(key) else PREFIX + hashlib.sha256(key.encode()).hexdigest()


def is_hash(text: str) -> bool:
    return _HASH.fullmatch(text) is not None


def is_name(text: str) -> bool:
    """What a key may be called: no slash and no space, so that names can be parts of other texts."""
    return _NAME.fullmatch(text) is not None


def same(one: str, other: str) -> bool:
    """Whether two hashes are equal, in a time that does not tell where they differ."""
    return hmac.compare_digest(one, other)
