"""What only the model's own code knows of its caches: a short-lived job for `mlx-serving show`.

`python -m mlx_serving.runtime.describe FOLDER` prints one `jobwire.Described` as JSON. The weights'
headers are read and a forward pass is built; nothing of it is computed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from mlx_serving.errors import MLXServingError
from mlx_serving.runtime.backend.loader import read_json
from mlx_serving.types import ENCODERS
from mlx_serving.worker.jobwire import Described

if TYPE_CHECKING:
    from mlx_serving.runtime.backend.kv import KVStore
    from mlx_serving.runtime.backend.kv_layers import MakeKVLayer

_TOKENS = 4
_BUCKET = 256


def describe(path: Path) -> Described:
    """Raises MLXServingError, or whatever a model that cannot be built leads to."""
    kind = read_json(path / "config.json", required=True).get("model_type")
    if kind == "scripted":
        return Described(prefix_reuse="none", why="it has no cache: its answers are written down")
    if kind in ENCODERS:
        return Described(prefix_reuse="none", why="an encoder reads its whole input at once")
    return _decoder(path, str(kind))


def _decoder(path: Path, kind: str) -> Described:
    import mlx.core as mx
    from mlx_lm.utils import load_model

    from mlx_serving.runtime.backend.arch import make_store
    from mlx_serving.runtime.backend.kv_layers import KVLayer
    from mlx_serving.runtime.backend.quantized_kv import check, refusal
    from mlx_serving.runtime.backend.weights import cast, target_dtype

    model: Any
    model, config = load_model(path, lazy=True)
    cast(model, target_dtype("auto", mx.default_device().type == mx.gpu))

    def built(attention: MakeKVLayer) -> KVStore:
        store = make_store(model, kind, 1, bucket=_BUCKET, exact_batch=False, attention=attention)
        store.start(0, _TOKENS)
        model(mx.zeros((1, _TOKENS), mx.int32), cache=store.row_view(0, 0, _TOKENS))
        return store

    store = built(KVLayer)
    quantised, why_not = _quantised(built, refusal(config) or check(store))
    return Described(
        prefix_reuse=store.prefix_reuse,
        why=_why(model, kind, store.prefix_reuse),
        kv_bytes_per_token=store.bytes_per_token(),
        state_bytes_per_row=store.state_bytes(),
        batched=store.batched,
        kv_bytes_by_bits=quantised,
        kv_bits_why_not=why_not,
    )


def _quantised(
    built: Callable[[MakeKVLayer], KVStore], why_not: str | None
) -> tuple[dict[str, int], str]:
    """A token's bytes for each `kv_bits`, and why others cannot be."""
    from mlx_serving.runtime.backend.quantized_kv import FORMATS, QuantizedLayer, Unquantizable

    if why_not is not None:
        return {}, why_not
    found, why = {}, ""
    for bits, form in FORMATS.items():
        if form is not None:
            try:
                store = built(partial(QuantizedLayer, form=form))
            except Unquantizable as error:
                why = error.why
            else:
                found[str(bits)] = store.bytes_per_token()
    return found, why


def _why(model: Any, kind: str, reuse: str) -> str:
    from mlx_lm.models.cache import make_prompt_cache

    from mlx_serving.runtime.backend.arch import QUIRKS, Quirk

    caches = sorted({type(cache).__name__ for cache in make_prompt_cache(model)})
    layers = ", ".join(caches)
    if reuse == "blocks":
        return f"attention layers only ({layers}): any block of a prompt can be copied"
    if reuse == "snapshots":
        return f"recurrent layers ({layers}): their state is kept at the ends of prompt chunks"
    if QUIRKS.get(kind, Quirk()).separate:
        return "its model code reaches into its cache in a way that only one sequence allows"
    return f"its caches ({layers}) have no form that rows can share"


def main() -> int:
    try:
        described = describe(Path(sys.argv[1]))
    except MLXServingError as error:
        sys.stderr.write(error.message + "\n")
        return 1
    sys.stdout.buffer.write(msgspec.json.encode(described))
    return 0


if __name__ == "__main__":
    sys.exit(main())
