"""Which variant answers: a split of traffic by the hash of a stable key, so that a user stays put."""

from __future__ import annotations

from hashlib import blake2b


def position(name: str, key: str) -> float:
    """Where `key` stands in the split called `name`, in [0, 1): evenly spread, the same in every
    process, and independent between names."""
    digest = blake2b(f"{name}\0{key}".encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def takes_part(name: str, key: str, share: float) -> bool:
    """Whether `key` is in the first `share` of the split: who is in at 10 % still is at 25 %."""
    return position(name, key) < share
