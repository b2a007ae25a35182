"""MODEL → a new folder of our own: what was asked for, whether it makes sense, and its making."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import msgspec

from mlx_serving.catalog import jobs
from mlx_serving.catalog.digests import expected, remember_all
from mlx_serving.catalog.ensure import ensure
from mlx_serving.catalog.home import exclusive, model_folder, models_home, sweep
from mlx_serving.catalog.known import Known
from mlx_serving.catalog.names import default_name
from mlx_serving.catalog.progress import Progress
from mlx_serving.catalog.resolve import LocalGGUF, resolve
from mlx_serving.config import Config
from mlx_serving.errors import ConfigError

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
MODES = ("affine", "mxfp4", "nvfp4", "mxfp8")
RECIPES = ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")
DTYPES = ("float32", "float16", "bfloat16")
_NAME = re.compile(r"[\w][\w.+-]*", re.ASCII)


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes of the weights; None: not asked for."""

    bits: int | None = None
    group_size: int | None = None
    mode: str | None = None
    recipe: str | None = None
    dequantize: bool = False
    dtype: str | None = None

    @property
    def quantizes(self) -> bool:
        return any(x is not None for x in (self.bits, self.group_size, self.mode, self.recipe))

    def flags(self) -> list[str]:
        """Of the conversion job."""
        flags = ["--quantize"] if self.quantizes else []
        flags += ["--dequantize"] if self.dequantize else []
        for name in ("bits", "group_size", "mode", "recipe", "dtype"):
            if (value := getattr(self, name)) is not None:
                flags += [f"--{name.replace('_', '-')}", str(value)]
        return flags

    def suffix(self) -> str:
        """What a result without a name of its own is called after its source."""
        if self.recipe:
            return self.recipe.replace("_", "-")
        if self.mode not in (None, "affine"):
            return str(self.mode)
        if self.quantizes:
            return f"{self.bits or 4}bit"
        return self.dtype or ("floats" if self.dequantize else "mlx")


def check(wish: Wish) -> None:
    """Raises ConfigError naming the flag: a value out of its range, or two that contradict."""
    allowed: Sequence[tuple[str, Sequence[object]]] = (
        ("bits", BITS),
        ("group_size", GROUP_SIZES),
        ("mode", MODES),
        ("recipe", RECIPES),
        ("dtype", DTYPES),
    )
    for name, values in allowed:
        value = getattr(wish, name)
        if value is not None and value not in values:
            raise _wrong(name, f"expected one of {', '.join(map(str, values))}, got {value}")
    if wish.recipe and wish.bits:
        raise _wrong("bits", "a recipe says itself how many bits each layer has")
    if wish.mode not in (None, "affine"):
        if wish.recipe:
            raise _wrong("mode", "recipes are for affine quantisation")
        if wish.bits or wish.group_size:
            raise _wrong("mode", f"{wish.mode} has its own bits and group size")


def _wrong(name: str, reason: str) -> ConfigError:
    flag = f"--{name.replace('_', '-')}"
    return ConfigError(f"{flag}: {reason}", param=flag)


def convert(
    spec: str, wish: Wish, config: Config, progress: Progress, *, name: str | None = None
) -> Path:
    """The new folder, visible only once it is whole; MODEL is fetched if need be.

    Raises ConfigError for what cannot be asked, ModelNotFound, ModelBroken by cause.
    """
    check(wish)
    home = models_home(config.home, os.environ)
    source = resolve(spec, home)
    if not isinstance(source, LocalGGUF) and wish == Wish():
        raise ConfigError(
            "nothing to do: give --bits, --recipe, --mode, --dequantize or --dtype", param="--bits"
        )
    name = name or f"{default_name(spec).split('/')[-1]}-{wish.suffix()}"
    if not _NAME.fullmatch(name):
        raise _wrong("name", f"{name!r} is no name for a folder")
    target = model_folder(home, name)
    if target.exists():
        raise _wrong("name", f"{target.name} is there already: remove it, or choose another name")
    folder = None
    if not isinstance(source, LocalGGUF) or wish.flags() != _gguf_wish(wish).flags():
        folder = ensure(spec, config, progress).path
    with exclusive(home, target.name):
        sweep(target.parent, f".{target.name}.")
        try:
            if folder is not None:
                jobs.requantize(folder, target, wish.flags(), progress)
            else:
                assert isinstance(source, LocalGGUF)
                _from_gguf(source.path, target, wish, progress)
        finally:
            sweep(target.parent, f".{target.name}.")
        remember_all(expected(target), Known(home))
    return target


def _gguf_wish(wish: Wish) -> Wish:
    """The part of a wish that a GGUF file's conversion can do by itself, in one pass."""
    return Wish(bits=wish.bits, group_size=wish.group_size)


def _from_gguf(source: Path, target: Path, wish: Wish, progress: Progress) -> None:
    quantize = (wish.bits or 4, wish.group_size or 64) if wish.quantizes else None
    jobs.convert_gguf(source, target, progress, quantize=quantize)
