"""Exit codes; scripts may rely on them."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

from mlx_serving.errors import ConfigError, MLXServingError

if TYPE_CHECKING:
    from mlx_serving.cli.say import Say


class Exit(IntEnum):
    OK = 0
    FAILED = 1
    """Something went wrong on the way; stderr says what."""
    USAGE = 2
    """A flag, a variable or a line of the config file is wrong."""
    CANNOT_WORK = 3
    """This host cannot run MLX; see `mlx-serving doctor`."""
    CANNOT_BIND = 4
    """The address is in use, not ours, or not allowed."""
    NO_MODEL = 5
    """The model cannot be found, fetched or loaded."""
    FILES_BROKEN = 6
    """`health`: a model's files are broken; `repair` may mend them."""
    CANNOT_RUN = 7
    """`health`: the files are whole, but this installation or machine cannot run the model."""
    INTERRUPTED = 130


def failed(error: MLXServingError, say: Say, otherwise: Exit = Exit.NO_MODEL) -> Exit:
    """Say what went wrong. `otherwise`: the code of what is no mistake in the settings."""
    if isinstance(error, ConfigError):
        say.config_error(error)
        return Exit.USAGE
    say.error(error.code, error.message)
    return otherwise
