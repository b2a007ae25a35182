"""Can a model be served? Broken files are one answer, a runtime that cannot run it another.

    Healthy
    Broken(problems)   the files are at fault: fetch them again
    Unable(causes)     the files are fine, this installation or machine is not enough

The verdict is a pure function of what was read; reading is `examine`'s part.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, assert_never

import msgspec

from mlx_serving.catalog.architectures import Modality, modalities, supported
from mlx_serving.catalog.folder import Problem, check, read_config, weight_files
from mlx_serving.errors import ModelBroken
from mlx_serving.host import Host, look

CauseKind = Literal["unsupported_architecture", "extra_missing", "custom_code", "no_memory"]
MEMORY_SHARE = 0.6
"""Of a machine's memory that models may take where the device names no limit of its own."""


class Cause(msgspec.Struct, frozen=True, kw_only=True):
    """Why this installation cannot run a model whose files are whole."""

    kind: CauseKind
    detail: str
    remedy: str | None = None

    def __str__(self) -> str:
        return self.detail + (f"; {self.remedy}" if self.remedy else "")


class Healthy(msgspec.Struct, frozen=True, tag="ok"):
    pass


class Broken(msgspec.Struct, frozen=True, tag="broken"):
    problems: tuple[Problem, ...]


class Unable(msgspec.Struct, frozen=True, tag="unable"):
    causes: tuple[Cause, ...]


Verdict = Healthy | Broken | Unable


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What of this installation and machine bears on a verdict."""

    extras: frozenset[str]
    """Optional parts that are installed: `vision`."""
    model_bytes: int | None
    """What models may take; None where the device's own memory counts, which only a job can ask."""


def judge(
    problems: Sequence[Problem],
    config: Mapping[str, Any],
    kinds: Sequence[Modality],
    weight_bytes: int,
    machine: Machine,
) -> Verdict:
    """Broken files first: what they say of the architecture or the size may be wrong too."""
    if problems:
        return Broken(tuple(problems))
    causes = [
        cause
        for cause in (
            _custom_code(config),
            _architecture(config, kinds, machine),
            _memory(weight_bytes, machine),
        )
        if cause is not None
    ]
    return Unable(tuple(causes)) if causes else Healthy()


def _custom_code(config: Mapping[str, Any]) -> Cause | None:
    if not config.get("model_file"):
        return None
    return Cause(
        kind="custom_code",
        detail=f"config.json asks to run {config['model_file']!r}; a model's code is never run",
    )


def _architecture(
    config: Mapping[str, Any], kinds: Sequence[Modality], machine: Machine
) -> Cause | None:
    if supported(config):
        return None
    named = f"architecture {config.get('model_type')!r}"
    if "vision" in kinds and "vision" not in machine.extras:
        return Cause(
            kind="extra_missing",
            detail=f"{named} needs mlx-vlm, which is not installed",
        )
    return Cause(
        kind="unsupported_architecture", detail=f"{named} is unknown to the installed mlx-lm"
    )


def _memory(weight_bytes: int, machine: Machine) -> Cause | None:
    have = machine.model_bytes
    if have is None or weight_bytes <= have:
        return None
    return Cause(
        kind="no_memory",
        detail=f"its weights take {_gb(weight_bytes)}, and models may take {_gb(have)} here",
        remedy="quantise it to fewer bits, or use a machine with more memory",
    )


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def examine(path: Path, machine: Machine, extra: Sequence[Problem] = ()) -> Verdict:
    """The verdict on a folder, its files' structure read; `extra` is what else is wrong with them."""
    problems = [*check(path), *extra]
    if problems:
        return Broken(tuple(problems))
    config = read_config(path)
    weights = sum(file.stat().st_size for file in weight_files(path))
    return judge((), config, modalities(config, path), weights, machine)


def this_machine(host: Host | None = None) -> Machine:
    host = host or look()
    return Machine(extras=_extras(), model_bytes=_model_bytes(host))


def _extras() -> frozenset[str]:
    return frozenset({"vision"} if importlib.util.find_spec("mlx_vlm") else ())


def _model_bytes(host: Host) -> int | None:
    import importlib.metadata  # 20 ms that `serve` need not wait for

    for name in ("mlx-cuda-12", "mlx-cuda-13"):
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return None
    memory = min(host.memory_bytes, host.memory_limit_bytes or host.memory_bytes)
    return int(memory * (1 if host.system == "Darwin" else MEMORY_SHARE))


def describe(verdict: Verdict) -> tuple[str, str | None]:
    """A word and a reason."""
    match verdict:
        case Healthy():
            return "ok", None
        case Broken(problems):
            return "broken", "; ".join(map(str, problems))
        case Unable(causes):
            return "cannot run", "; ".join(map(str, causes))
        case _:
            assert_never(verdict)


def refuse(path: Path, verdict: Verdict) -> None:
    """Raises ModelBroken with the verdict's cause, unless it is Healthy."""
    match verdict:
        case Healthy():
            return
        case Broken(problems):
            kinds = {problem.kind for problem in problems}
            code = "wrong_hash" if kinds == {"wrong_hash"} else "corrupt_file"
            listed = "; ".join(map(str, problems[:5]))
            more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise ModelBroken(f"the model in {path} has broken files: {listed}{more}", code=code)
        case Unable(causes):
            raise ModelBroken(
                f"the model in {path} cannot run here: {'; '.join(map(str, causes))}",
                code=causes[0].kind,
            )
        case _:
            assert_never(verdict)
