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

from mlx_serving.adapter_folder import BadAdapter, is_adapter
from mlx_serving.catalog.adapters import read_adapter
from mlx_serving.catalog.architectures import Modality, modalities, supported
from mlx_serving.catalog.budget import estimate_folder
from mlx_serving.catalog.folder import Problem, check, read_config, read_folder
from mlx_serving.catalog.sizes import check_sizes
from mlx_serving.config import Config
from mlx_serving.errors import ModelBroken
from mlx_serving.host import Host, look, memory_budget_bytes

CauseKind = Literal[
    "unsupported_architecture",
    "unsupported_adapter",
    "extra_missing",
    "custom_code",
    "model_too_large",
]


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
    dtype: str = "auto"
    """`Config.dtype`, and the system: they decide how weights lie in memory."""
    system: str = "Linux"


def judge(
    problems: Sequence[Problem],
    config: Mapping[str, Any],
    kinds: Sequence[Modality],
    need_bytes: int,
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
            _memory(need_bytes, machine),
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


def _memory(need_bytes: int, machine: Machine) -> Cause | None:
    have = machine.model_bytes
    if have is None or need_bytes <= have:
        return None
    return Cause(
        kind="model_too_large",
        detail=f"it needs about {_gb(need_bytes)} of memory, and models may take {_gb(have)} here",
        remedy="quantise it to fewer bits, or raise --memory-budget",
    )


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def examine(path: Path, machine: Machine, extra: Sequence[Problem] = ()) -> Verdict:
    """The verdict on a folder, its files' structure read; `extra` is what else is wrong with them."""
    if is_adapter(path):
        return _adapter(path, extra)
    problems = [*check(path), *extra]
    if problems:
        return Broken(tuple(problems))
    config = read_config(path)
    if problems := check_sizes(config):
        return Broken(tuple(problems))
    need = estimate_folder(read_folder(path, path.name), machine.dtype, machine.system)
    return judge((), config, modalities(config, path), need, machine)


def _adapter(path: Path, extra: Sequence[Problem]) -> Verdict:
    """Whether it fits a model is seen beside it."""
    problems = list(extra)
    try:
        read_adapter(path)
    except BadAdapter as bad:
        if bad.kind == "unsupported":
            why = Cause(kind="unsupported_adapter", detail=f"{bad.file}: {bad.detail}")
            return Broken(tuple(problems)) if problems else Unable((why,))
        problems.insert(0, Problem(file=bad.file, kind=bad.kind, detail=bad.detail))
    return Broken(tuple(problems)) if problems else Healthy()


def this_machine(config: Config | None = None, host: Host | None = None) -> Machine:
    """`config`: None where memory is somebody else's business."""
    host = host or look()
    return Machine(
        extras=_extras(),
        model_bytes=None if config is None else _model_bytes(config.memory_budget, host),
        dtype="auto" if config is None else config.dtype,
        system=host.system,
    )


def _extras() -> frozenset[str]:
    return frozenset({"vision"} if importlib.util.find_spec("mlx_vlm") else ())


def _model_bytes(given: float | None, host: Host) -> int | None:
    import importlib.metadata  # 20 ms that `serve` need not wait for

    for name in ("mlx-cuda-12", "mlx-cuda-13"):
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return None
    # How much of its memory a Mac gives to Metal only Metal knows: then all of it is not too much.
    lenient = 1.0 if given is None and host.system == "Darwin" else given
    return memory_budget_bytes(lenient, host)


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
