"""`serve`'s flags, made from the fields of `Config`, so that the two cannot drift.

A flag's name, type, default and range come from the field, its help from the docstring under it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from mlx_serving.config import FIELDS, Config, choices, flag_name, is_bool, is_list, metavar

POSITIONAL = "models"
"""The one field that is an argument instead of a flag."""

GROUPS = {
    "models": "Models",
    "host": "Server",
    "max_num_seqs": "Engine",
    "supervise": "Worker",
}
"""The first field of each group in `--help`; the fields that follow it belong to it."""


class ServeArgs(msgspec.Struct, kw_only=True):
    """What was given on `serve`'s command line: settings as text, by field name."""

    settings: dict[str, str | list[str]] = {}
    config_file: str | None = None
    json: bool = False

    def add(self, name: str, text: str) -> None:
        if is_list(name):
            texts = self.settings.setdefault(name, [])
            assert isinstance(texts, list)
            texts.append(text)
        else:
            self.settings[name] = text


_BY_FLAG = {flag_name(name): name for name in FIELDS if name != POSITIONAL}


def parse_plain(argv: Sequence[str]) -> ServeArgs | None:
    """Parse flags that are spelt out in full; None where it takes typer to help or to complain."""
    args = ServeArgs()
    words = iter(argv)
    for word in words:
        flag, equals, text = word.partition("=")
        negated = flag.removeprefix("--no-").replace("-", "_")
        if not word.startswith("-"):
            args.add(POSITIONAL, word)
        elif word == "--json":
            args.json = True
        elif flag == "--config" or (flag in _BY_FLAG and not is_bool(_BY_FLAG[flag])):
            value = text if equals else next(words, "-")
            if value.startswith("-"):
                return None
            if flag == "--config":
                args.config_file = value
            else:
                args.add(_BY_FLAG[flag], value)
        elif flag in _BY_FLAG and not equals:
            args.add(_BY_FLAG[flag], "true")
        elif word.startswith("--no-") and negated in FIELDS and is_bool(negated):
            args.add(negated, "false")
        else:
            return None
    return args


def from_typer(values: Mapping[str, Any], config_file: str | None, json: bool) -> ServeArgs:
    """The same from what typer parsed: None is a flag that was not given."""
    args = ServeArgs(config_file=config_file, json=json)
    for name, value in values.items():
        match value:
            case None:
                continue
            case bool():
                args.add(name, "true" if value else "false")
            case str():
                args.add(name, value)
            case _:
                for text in value:
                    args.add(name, text)
    return args


# ------------------------------------------------------------------- help


def documented(command: Callable[..., None]) -> Callable[..., None]:
    """Give a typer command a parameter for each setting, ahead of its own."""
    import inspect

    own = inspect.signature(command, eval_str=True).parameters.values()
    docs, group = field_docs(), ""
    settings = []
    for name in FIELDS:
        group = GROUPS.get(name, group)
        settings.append(_parameter(name, docs[name], group))
    parameters = [*settings, *(p for p in own if p.kind is not p.VAR_KEYWORD)]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _parameter(name: str, help_text: str, group: str) -> Any:
    import inspect

    import typer

    kind: Any = list[str] | None if is_list(name) else bool | None if is_bool(name) else str | None
    shown = f" ({default})" if (default := _default(name)) else ""
    common: dict[str, Any] = {
        "help": f"{help_text.rstrip('.')}.{shown}",
        "rich_help_panel": group,
        "show_default": False,
    }
    if name == POSITIONAL:
        info = typer.Argument(None, metavar="MODEL", **common | {"rich_help_panel": "Arguments"})
    elif is_bool(name):
        info = typer.Option(None, f"{flag_name(name)}/{flag_name('no_' + name)}", **common)
    else:
        word = "|".join(choices(name)) or metavar(name).upper()
        info = typer.Option(None, flag_name(name), metavar=word, **common)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=info, annotation=kind)


def _default(name: str) -> str:
    """What `--help` shows in brackets; nothing where the text says what happens without it."""
    value = FIELDS[name].default
    if value is None or value == ():
        return ""
    if is_bool(name):
        return f"default: {'on' if value else 'off'}"
    text = ", ".join(value) if isinstance(value, tuple) else str(value)
    return f"default: {text}"


def field_docs() -> dict[str, str]:
    """The docstring under each field of Config, on one line."""
    import ast
    import inspect
    import textwrap

    tree = ast.parse(textwrap.dedent(inspect.getsource(Config))).body[0]
    assert isinstance(tree, ast.ClassDef)
    docs: dict[str, str] = {}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        match field, below:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                docs[name] = " ".join(text.split())
    return docs
