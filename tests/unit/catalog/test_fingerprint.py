from __future__ import annotations

from mlx_serving.catalog.fingerprint import SAMPLE_BYTES, fingerprint


def test_it_follows_the_files_and_not_their_place(tmp_path) -> None:
    def folder(name: str, config: str = "{}", weights: bytes = bytes(5 * SAMPLE_BYTES)):
        path = tmp_path / name
        path.mkdir()
        (path / "config.json").write_text(config)
        (path / "model.safetensors").write_bytes(weights)
        return path

    def flipped(at: int) -> bytes:
        weights = bytearray(5 * SAMPLE_BYTES)
        weights[at] = 1
        return bytes(weights)

    same = [fingerprint(path, path) for path in (folder("a"), folder("b"))]
    other = [
        folder("c", config='{"a": 1}'),
        folder("d", weights=bytes(4 * SAMPLE_BYTES)),
        folder("e", weights=flipped(10)),
        folder("f", weights=flipped(5 * SAMPLE_BYTES // 2)),
        folder("g", weights=flipped(-1)),
    ]
    assert len({*same, *(fingerprint(path, path) for path in other)}) == 6


def test_a_tokenizer_elsewhere_counts(tmp_path) -> None:
    model, tokenizer = tmp_path / "m", tmp_path / "t"
    for path in (model, tokenizer):
        path.mkdir()
    before = fingerprint(model, tokenizer)
    (tokenizer / "tokenizer.json").write_text("{}")
    assert fingerprint(model, tokenizer) != before
