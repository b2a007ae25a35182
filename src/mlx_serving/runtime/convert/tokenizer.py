"""A tokenizer.json for a model folder that has only a slow tokenizer's files.

Goes through transformers, which knows how each slow tokenizer converts; that import is why this
is a job and not part of a server. Code from the model's repository is never run.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from mlx_serving.errors import ModelBroken
from mlx_serving.runtime.convert.folder import publish


def convert_tokenizer(source: Path, folder: Path) -> None:
    """Write `folder` with tokenizer.json and tokenizer_config.json made from `source`'s files.

    Raises ModelBroken (unsupported_tokenizer) when transformers cannot make one.
    """
    from transformers import AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        temporary.chmod(0o755)
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                str(source), local_files_only=True, trust_remote_code=False
            )
            tokenizer.save_pretrained(str(temporary))
        except Exception as e:  # transformers raises whatever its converters meet
            raise ModelBroken(
                f"{source}: no tokenizer.json can be made of its tokenizer ({e})",
                code="unsupported_tokenizer",
            ) from e
        if not (temporary / "tokenizer.json").is_file():
            raise ModelBroken(
                f"{source}: its tokenizer has no fast form, so no tokenizer.json",
                code="unsupported_tokenizer",
            )
        publish(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
