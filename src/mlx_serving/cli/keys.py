"""`mlx-serving keys`: make an API key, and what the server keeps of it."""

from __future__ import annotations

from mlx_serving.cli.exits import Exit
from mlx_serving.cli.say import Say
from mlx_serving.secret import hashed, is_name, new_key


def new(name: str, say: Say | None = None) -> int:
    """Print a key once, and the entry for --api-keys-file that knows it by its hash."""
    say = say or Say()
    if not is_name(name):
        say.error("invalid_name", f"'{name}' is no key's name: letters, digits and ._- only")
        return Exit.USAGE
    key = new_key()
    lines = [
        f"key   {key}",
        f"hash  {hashed(key)}",
        "",
        "The key is not kept anywhere: give it to its user. In the --api-keys-file, under 'keys:',",
        f"  - name: {name}",
        f"    hash: {hashed(key)}",
    ]
    say.event("key", "\n".join(lines), key=key, hash=hashed(key), name=name)
    return Exit.OK
