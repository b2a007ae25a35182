"""The `mlx-serving` command: one file a subcommand, each flags → Config → call.

Nothing is imported before it is needed. `serve` is parsed without typer (110 ms) where its
arguments are plain; help, completion and every mistake go through typer, which knows the same
flags.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from typing import NoReturn


def main(argv: Sequence[str] | None = None) -> NoReturn:
    args = [*(sys.argv[1:] if argv is None else argv)]  # `list` may be the command's module
    if args[:1] == ["serve"]:
        gc.disable()  # a tenth of the start is collections that find nothing; serve turns it on
        from mlx_serving.cli import flags, serve

        parsed = flags.parse_plain(args[1:])
        if parsed is not None:
            sys.exit(serve.run(parsed))
    if args in (["--version"], ["version"]):
        from mlx_serving import __version__

        print(__version__)
        sys.exit(0)
    from mlx_serving.cli.app import app

    app(args, prog_name="mlx-serving")
    sys.exit(0)
