"""The YAML half of the configuration: nodes, not values, so that each mistake has its line.

Scalars are handed on as they are written: `kernels: off` is the word, not YAML 1.1's boolean.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from mlx_serving.config import FIELDS, unknown
from mlx_serving.config_sources import Given
from mlx_serving.errors import ConfigError

_NULL = "tag:yaml.org,2002:null"


def read(path: Path) -> tuple[list[Given], list[str]]:
    """Settings in the file, and what is wrong with its keys.

    Raises:
        ConfigError: the file cannot be read, or is not a YAML mapping.
    """
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", param=str(path)) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text", param=str(path)) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{place}: {error.problem or error.context}", param=place) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {error}", param=str(path)) from None
    if root is None:
        return [], []
    if not isinstance(root, yaml.MappingNode):
        place = f"{path}:{root.start_mark.line + 1}"
        raise ConfigError(f"{place}: expected 'key: value' lines", param=place)
    return _pairs(path, root)


def _pairs(path: Path, node: yaml.MappingNode, prefix: str = "") -> tuple[list[Given], list[str]]:
    given: list[Given] = []
    problems: list[str] = []
    seen: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        place = f"{path}:{line}"
        name = key.value if isinstance(key, yaml.ScalarNode) else "?"
        if not prefix and name not in FIELDS:
            problems.append(f"{place}: {unknown(name, 'key')}")
        elif name in seen:
            problems.append(f"{place}: key '{prefix}{name}' is already on line {seen[name]}")
        else:
            try:
                match prefix, name:
                    case "", "models":
                        found = _models(path, value, problems)
                    case _, "warm_up":
                        found = _chats(value)
                    case _, "adapters":
                        found = _named(value)
                    case _:
                        found = _text(value)
                given.append(Given(f"{place}: {prefix}{name}", name, found))
            except ValueError as error:
                problems.append(f"{place}: {prefix}{name}: {error}")
        seen.setdefault(name, line)
    return given, problems


def _models(path: Path, node: yaml.Node, problems: list[str]) -> object:
    """Of `models`: an item may be a mapping, one model's settings."""
    if not isinstance(node, yaml.SequenceNode):
        return _text(node)
    items: list[str | Given] = []
    for i, item in enumerate(node.value):
        match item:
            case yaml.ScalarNode(value=value):
                items.append(value)
            case yaml.MappingNode():
                keys, wrong = _pairs(path, item, f"models[{i}].")
                problems += wrong
                place = f"{path}:{item.start_mark.line + 1}: models[{i}]"
                items.append(Given(place, "models", keys))
            case _:
                raise ValueError(f"[{i}]: expected a model, or 'key: value' lines")
    return items


def _chats(node: yaml.Node) -> object:
    """Of `warm_up`: an item may be a mapping of texts."""
    if not isinstance(node, yaml.SequenceNode):
        return _text(node)
    return [
        {str(key.value): _text(value) for key, value in item.value}
        if isinstance(item, yaml.MappingNode)
        else _text(item)
        for item in node.value
    ]


def _named(node: yaml.Node) -> object:
    """Of `adapters`: a mapping of names to folders, or a list of NAME=FOLDER."""
    if not isinstance(node, yaml.MappingNode):
        return _text(node)
    return [f"{key.value}={_text(value)}" for key, value in node.value]


def _text(node: yaml.Node) -> str | list[str] | None:
    """Raises ValueError where a value is neither plain nor a list of plain values."""
    match node:
        case yaml.ScalarNode(tag=tag, value=value):
            return None if tag == _NULL else str(value)
        case yaml.SequenceNode(value=items) if all(isinstance(i, yaml.ScalarNode) for i in items):
            return [item.value for item in items]
        case _:
            raise ValueError("expected a plain value or a list of them")
