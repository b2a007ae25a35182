"""Pulls a model from a Hugging Face hub into the hub's own cache, and checks what arrived.

huggingface_hub honours HF_TOKEN, HF_ENDPOINT, HF_HOME, HF_HUB_CACHE and HF_HUB_OFFLINE, lays out the
cache and fetches the small files. The large ones are fetched by `download`, under the locks and the
names that huggingface_hub has for them: it deletes what a process has not finished and does not
hash what comes over HTTP. It is imported when first used: 0.3 s.
"""

from __future__ import annotations

import errno
import glob
import json
from contextlib import ExitStack
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_serving.adapter_folder import MLX_LM_FILE, PEFT_FILE
from mlx_serving.catalog.digests import check_digests, remember
from mlx_serving.catalog.home import check_space
from mlx_serving.catalog.known import Known
from mlx_serving.catalog.progress import Progress
from mlx_serving.errors import MLXServingError, ModelBroken, ModelNotFound

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

    from mlx_serving.catalog.download import Download

WANTED = (
    "*.json",
    "model*.safetensors",
    MLX_LM_FILE,
    PEFT_FILE,
    "tokenizer.model",
    "*.tiktoken",
    "*.txt",
    "*.jinja",
    "README.md",
    "LICENSE*",
)
"""Files at a repository's top that serving needs; never code, never other frameworks' weights."""
MODULES = ("[0-9]_*/config.json", "[0-9]_*/model.safetensors")
"""What sentence-transformers does after the transformer: pooling, dense layers."""
_INFO_TIMEOUT_S = 20.0


def pull(repo: str, revision: str | None, *, home: Path, offline: bool, progress: Progress) -> Path:
    """The snapshot's folder. Falls back to a complete cached snapshot when the hub cannot be reached.

    Raises ModelNotFound (no such repository or revision), ModelBroken with code hub_unauthorized,
    hub_forbidden, hub_unreachable, hub_error, offline, no_space, no_weights or wrong_hash.
    """
    from huggingface_hub import HfApi, constants

    if offline or constants.HF_HUB_OFFLINE:
        return _cached(
            repo,
            revision,
            ModelBroken(
                f"{repo} is not in the hub cache, and fetching is switched off", code="offline"
            ),
        )
    try:
        info = HfApi().model_info(
            repo, revision=revision, files_metadata=True, timeout=_INFO_TIMEOUT_S
        )
    except Exception as e:  # huggingface_hub lets its HTTP client's own errors through
        error = _typed(e, repo, revision)
        if error.code in ("hub_unreachable", "hub_error"):
            return _cached(repo, revision, error)
        raise error from e
    files = _wanted(repo, info)
    snapshot, known = _snapshot_folder(repo, info), Known(home)
    if not all(_whole(snapshot, file) for file in files):
        _download(repo, revision, files, snapshot, known, progress)
    _verify(repo, files, snapshot, known, progress)
    return snapshot


def _cached(repo: str, revision: str | None, otherwise: MLXServingError) -> Path:
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            repo,
            revision=revision,
            local_files_only=True,
            allow_patterns=list(WANTED),
            ignore_patterns=["*/*"],
        )
        return Path(found)
    except Exception:  # whatever keeps the cache from serving it, the first error is the cause
        raise otherwise from None


def _snapshot_folder(repo: str, info: ModelInfo) -> Path:
    from huggingface_hub import constants

    return (
        Path(constants.HF_HUB_CACHE)
        / f"models--{repo.replace('/', '--')}"
        / "snapshots"
        / str(info.sha)
    )


def _wanted(repo: str, info: ModelInfo) -> list[RepoSibling]:
    siblings = info.siblings or []
    files = [file for file in siblings if _is_wanted(file.rfilename)]
    if not any(file.rfilename.endswith(".safetensors") for file in files):
        ggufs = [file.rfilename for file in siblings if file.rfilename.endswith(".gguf")]
        hint = (
            f"; download one of its GGUF files ({', '.join(ggufs[:3])}) and name that"
            if ggufs
            else ""
        )
        raise ModelBroken(f"{repo} has no safetensors weights{hint}", code="no_weights")
    return files


def _is_wanted(name: str) -> bool:
    patterns = WANTED if "/" not in name else MODULES
    return name.count("/") < 2 and any(fnmatch(name, pattern) for pattern in patterns)


def _whole(snapshot: Path, file: RepoSibling) -> bool:
    path = snapshot / file.rfilename
    return path.is_file() and path.stat().st_size == file.size


def _download(
    repo: str,
    revision: str | None,
    files: list[RepoSibling],
    snapshot: Path,
    known: Known,
    progress: Progress,
) -> None:
    from huggingface_hub import snapshot_download

    missing = [file for file in files if not _whole(snapshot, file)]
    large = [_large(repo, file, snapshot) for file in missing if _is_large(file)]
    small = sum(file.size or 0 for file in missing if not _is_large(file))
    to_come = small + sum(file.missing_bytes() for file in large)
    check_space(snapshot, to_come)
    progress.start(f"pull {repo}", to_come)
    names = [glob.escape(file.rfilename) for file in files]
    try:
        _fetch_large(large, snapshot, known, progress)
        snapshot_download(
            repo, revision=revision, allow_patterns=names, tqdm_class=_byte_meter(progress, small)
        )
    except Exception as e:  # as above
        raise _typed(e, repo, revision) from e
    progress.finish()


def _is_large(file: RepoSibling) -> bool:
    """Over 50 GB the hub does not send a file over plain HTTP: huggingface_hub has another way."""
    from huggingface_hub import constants

    return file.lfs is not None and file.lfs.size <= constants.MAX_HTTP_DOWNLOAD_SIZE


def _large(repo: str, file: RepoSibling, snapshot: Path) -> Download:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    from mlx_serving.catalog.download import Download

    assert file.lfs is not None
    return Download(
        name=f"{file.rfilename} of {repo}",
        url=hf_hub_url(repo, file.rfilename, revision=snapshot.name),
        target=snapshot.parents[1] / "blobs" / file.lfs.sha256,
        sha256=file.lfs.sha256,
        size_bytes=file.lfs.size,
        headers=build_hf_headers(),
    )


def _fetch_large(files: list[Download], snapshot: Path, known: Known, progress: Progress) -> None:
    """One lock a file, as the hub's other clients hold it, always in the same order."""
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    from mlx_serving.catalog.download import download_all

    repo_folder = snapshot.parents[1]
    locks = repo_folder.parent / ".locks" / repo_folder.name
    locks.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        for sha256 in sorted({file.sha256 for file in files}):
            held.enter_context(WeakFileLock(locks / f"{sha256}.lock"))
        download_all(files, progress.advance)
    for file in files:
        remember(file.target, f"sha256:{file.sha256}", known)


def _byte_meter(progress: Progress, total: int) -> Any:
    """A bar class for huggingface_hub that draws nothing and passes bytes on. It keeps several bars
    of the same bytes (received, written): the one furthest ahead counts."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    reported = 0

    class ByteMeter(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            self._counts_bytes = kwargs.get("unit") == "B"
            self._bytes = 0
            super().__init__(*args, **(kwargs | {"disable": True}))

        def update(self, n: float | None = 1) -> None:
            nonlocal reported
            if self._counts_bytes:
                with self.get_lock():
                    self._bytes += int(n or 0)
                    gained = min(self._bytes, total) - reported
                    if gained > 0:
                        reported += gained
                        progress.advance(gained)
            super().update(n)

    return ByteMeter


def _verify(
    repo: str, files: list[RepoSibling], snapshot: Path, known: Known, progress: Progress
) -> None:
    """Read what was never read, or has changed; delete what is not as published."""
    wanted = {snapshot / file.rfilename: digest for file in files if (digest := _digest(file))}
    wrong = [problem.file for problem in check_digests(wanted, known, "unread", progress, repo)]
    wrong += [file.rfilename for file in files if not _whole(snapshot, file)]
    if not wrong:
        return
    for name in wrong:
        path = snapshot / name
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    raise ModelBroken(
        f"{repo}: {', '.join(dict.fromkeys(wrong))} did not arrive as published (size or hash); "
        "deleted, pull again",
        code="wrong_hash",
    )


def _digest(file: RepoSibling) -> str | None:
    if file.lfs is not None:
        return f"sha256:{file.lfs.sha256}"
    return f"git:{file.blob_id}" if file.blob_id else None


def _typed(error: Exception, repo: str, revision: str | None) -> MLXServingError:
    from huggingface_hub import errors

    from mlx_serving.catalog.download import Refused

    named = f"{repo}@{revision}" if revision else repo
    if isinstance(error, MLXServingError):
        return error
    if isinstance(error, Refused):
        return _by_status(error.status, named, error)
    if isinstance(error, errors.GatedRepoError):
        return ModelBroken(
            f"{named} is gated: accept its licence on the hub and set HF_TOKEN",
            code="hub_forbidden",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelNotFound(f"{repo} has no revision {revision!r}", param="model")
    if isinstance(error, errors.HfHubHTTPError):
        return _by_status(error.response.status_code, named, error)
    if isinstance(error, errors.HFValidationError):
        return ModelNotFound(f"{named} is not a hub id: {error}", param="model")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return ModelBroken(f"{named}: the disk is full", code="no_space")
    if isinstance(error, json.JSONDecodeError):
        return ModelBroken(f"{named}: the hub's answer is not JSON", code="hub_error")
    return ModelBroken(
        f"{named}: the hub cannot be reached ({type(error).__name__}: {error})",
        code="hub_unreachable",
    )


def _by_status(status: int, named: str, error: Exception) -> MLXServingError:
    match status:
        case 401:
            return ModelBroken(
                f"{named} does not exist or is private: set HF_TOKEN to a token that may read it",
                code="hub_unauthorized",
            )
        case 403:
            return ModelBroken(
                f"{named}: this HF_TOKEN may not read it; its licence may have to be accepted",
                code="hub_forbidden",
            )
        case 404:
            return ModelNotFound(f"the hub has no model {named}", param="model")
        case _:
            return ModelBroken(f"{named}: the hub answered {status} ({error})", code="hub_error")
