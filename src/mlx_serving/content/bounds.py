"""What rendering a chat template may cost: time, and the size of any text it makes on the way.

A template comes with a model, from wherever that came. Jinja's sandbox keeps it from reaching the
interpreter; this keeps it from holding up a thread (loops and macros look at a clock) and from filling
the memory (what multiplies text is checked before it does).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlx_serving.clock import Clock

if TYPE_CHECKING:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_CHARS = 64 * 1024 * 1024
"""Of any text."""
MAX_ITEMS = 1_000_000
"""Of a list that is made of others."""
MAX_NUMBER = 1_000_000
"""As a width, an indent or an exponent's base's bits: what makes long texts of short ones."""
_WIDTHS = re.compile(r"\d{7}|\*")
"""In a format: a number of seven digits, or one that is an argument."""


class TooMuch(Exception):
    """The template goes over its bounds."""


@dataclass(frozen=True, slots=True)
class _Budget:
    clock: Clock
    until_s: float


_budget: ContextVar[_Budget | None] = ContextVar("budget", default=None)


@contextmanager
def budget(clock: Clock, seconds: float) -> Iterator[None]:
    """Templates that are rendered inside raise TooMuch once the time is over."""
    token = _budget.set(_Budget(clock, clock() + seconds))
    try:
        yield
    finally:
        _budget.reset(token)


def tick() -> str:
    """Called by every loop's and macro's body. Raises TooMuch."""
    current = _budget.get()
    if current is not None and current.clock() > current.until_s:
        raise TooMuch("too much time")
    return ""


def size(chars: int) -> None:
    """Raises TooMuch where a text would be too long."""
    if chars > MAX_CHARS:
        raise TooMuch("too much text")


def _length(kind: Any, length: int) -> None:
    if isinstance(kind, str):
        size(length)
    elif length > MAX_ITEMS:
        raise TooMuch("a list that is too long")


def concat(*parts: Any) -> str:
    """Jinja's `~`."""
    texts = [str(part) for part in parts]
    size(sum(map(len, texts)))
    return "".join(texts)


def check_operation(operator: str, left: Any, right: Any) -> None:
    """Raises TooMuch where `left operator right` would be too large."""
    match operator:
        case "*" if isinstance(left, str | list | tuple) and isinstance(right, int):
            _length(left, len(left) * right)
        case "*" if isinstance(right, str | list | tuple) and isinstance(left, int):
            _length(right, len(right) * left)
        case "+" if isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            _length(left, len(left) + len(right))
        case "*" if isinstance(left, int) and isinstance(right, int):
            _bits(left.bit_length() + right.bit_length())
        case "**" if isinstance(left, int) and isinstance(right, int):
            _bits(left.bit_length() * abs(right))
        case "%" if isinstance(left, str):
            check_format(left)
        case _:
            pass


def check_format(text: str) -> None:
    if _WIDTHS.search(text):
        raise TooMuch("a width that is too large")


def check_call(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises TooMuch for a method of a text that would make too much of it."""
    # The sandbox wraps `format`.
    function = getattr(function, "__wrapped__", function)
    text = getattr(function, "__self__", None)
    if not isinstance(text, str):
        return
    check_numbers(*args, *kwargs.values())
    match getattr(function, "__name__", ""):
        case "replace" if len(args) >= 2:
            _replaced(text, args[0], args[1])
        case "join" if args:
            _joined(text, args[0])
        case "format" | "format_map":
            check_format(text)
        case "expandtabs":
            size(len(text) * max([n for n in args if isinstance(n, int)], default=8))
        case _:
            pass


def check_numbers(*values: Any) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > MAX_NUMBER:
            raise TooMuch("a number that is too large")


def _bits(count: int) -> None:
    if count > MAX_NUMBER:
        raise TooMuch("a number that is too large")


def _replaced(text: str, old: Any, new: Any) -> None:
    if isinstance(old, str) and isinstance(new, str):
        size(len(text) + (text.count(old) if old else len(text) + 1) * len(new))


def _joined(separator: str, items: Any) -> None:
    if isinstance(items, list | tuple):
        size(sum(len(item) + len(separator) for item in items if isinstance(item, str)))


# ------------------------------------------------------------------- in Jinja


def guard_filters(environment: jinja2.Environment) -> None:
    """Put checks before the filters that make long texts of short ones."""

    def checked(check: Callable[..., None], wrapped: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(wrapped)
        def call(*args: Any, **kwargs: Any) -> Any:
            check(*args, **kwargs)
            return wrapped(*args, **kwargs)

        return call

    def numbers(*args: Any, **kwargs: Any) -> None:
        check_numbers(*args, *kwargs.values())

    def replaced(_: Any, text: Any, old: Any = "", new: Any = "", *_more: Any) -> None:
        _replaced(str(text), old, new)

    def joined(_: Any, items: Any, d: Any = "", *_more: Any, **_named: Any) -> None:
        _joined(str(d), items)

    def formatted(text: Any, *_args: Any, **_kwargs: Any) -> None:
        check_format(str(text))

    def indented(text: Any, *args: Any, **kwargs: Any) -> None:
        numbers(*args, **kwargs)
        width = max([n for n in (*args, *kwargs.values()) if isinstance(n, int)], default=4)
        size(len(str(text)) + (str(text).count("\n") + 1) * width)

    checks: dict[str, Callable[..., None]] = {
        "replace": replaced,
        "join": joined,
        "format": formatted,
        "indent": indented,
        **dict.fromkeys(("center", "wordwrap", "truncate", "batch", "slice", "tojson"), numbers),
    }
    for name, check in checks.items():
        environment.filters[name] = checked(check, environment.filters[name])


@functools.cache
def bounded_environment() -> type[ImmutableSandboxedEnvironment]:
    from jinja2 import nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.visitor import NodeTransformer

    class Ticking(NodeTransformer):
        """Has bodies tick, and `~` go through `concat`."""

        def visit_For(self, node: nodes.For) -> nodes.Node:
            self.generic_visit(node)
            node.body.insert(0, _output(node))
            return node

        def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
            self.generic_visit(node)
            node.body.insert(0, _output(node))
            return node

        def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
            self.generic_visit(node)
            return _call("concat_bounded", node.nodes, node)

    def _call(name: str, args: list[nodes.Expr], at: nodes.Node) -> nodes.Call:
        function = nodes.EnvironmentAttribute(name)
        called = nodes.Call(function, args, [], None, None)
        called.set_lineno(at.lineno)
        return called

    def _output(at: nodes.Node) -> nodes.Output:
        output = nodes.Output([_call("tick", [], at)])
        output.set_lineno(at.lineno)
        return output

    class BoundedEnvironment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"+", "*", "**", "%"})

        def tick(self) -> str:
            return tick()

        def concat_bounded(self, *parts: Any) -> str:
            return concat(*parts)

        def call_binop(
            self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
        ) -> Any:
            check_operation(operator, left, right)
            return super().call_binop(context, operator, left, right)

        def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
            check_call(__obj, args, kwargs)
            return super().call(__context, __obj, *args, **kwargs)

        def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
            ticking = Ticking().visit(source)
            ticking.set_environment(self)
            return super()._generate(ticking, *args, **kwargs)

    return BoundedEnvironment
