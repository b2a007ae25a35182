"""The Jinja environment that chat templates run in, as transformers sets it up.

Jinja's immutable sandbox, which also bounds a `range` (100,000 items), within `bounds`, and with what
chat templates use beyond Jinja: `raise_exception`, `strftime_now`, a `tojson` that does not escape HTML,
`break` and `continue`, and `{% generation %}`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any

from mlx_serving.clock import Clock
from mlx_serving.content import bounds

if TYPE_CHECKING:
    import jinja2


def open_environment(now: Clock) -> jinja2.Environment:
    """A fresh environment; `now` (seconds since the epoch) is what `strftime_now` reads."""
    import jinja2
    import jinja2.ext

    environment = bounds.bounded_environment()(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols, _generation_block()],
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(pattern: str) -> str:
        return datetime.fromtimestamp(now()).strftime(pattern)

    environment.filters["tojson"] = _to_json
    environment.globals["namespace"] = _plain_namespace()
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    bounds.guard_filters(environment)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which no model was trained on."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@functools.cache
def _generation_block() -> type[jinja2.ext.Extension]:
    import jinja2.ext
    import jinja2.nodes

    class GenerationBlock(jinja2.ext.Extension):
        """Marks what the assistant says, for training; here it only renders its body."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            render: Callable[..., jinja2.nodes.Expr] = self.call_method
            return [jinja2.nodes.CallBlock(render("_body"), [], [], body).set_lineno(line)]

        def _body(self, caller: Callable[[], str]) -> str:
            return caller()

    return GenerationBlock


@functools.cache
def _plain_namespace() -> type[jinja2.utils.Namespace]:
    import jinja2.exceptions
    import jinja2.utils

    class PlainNamespace(jinja2.utils.Namespace):
        """Takes no underscored names, which would reach the interpreter's own attributes."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            self, args = args[0], args[1:]
            jinja2.utils.Namespace.__init__(self)
            for name, value in dict(*args, **kwargs).items():
                self[name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")
            super().__setitem__(name, value)

    return PlainNamespace
