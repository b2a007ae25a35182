"""Without the kernels these tests skip with the reason, or fail where the kernels are required."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def kernels() -> None:
    from mlx_serving.runtime import native

    if not native.available():
        if os.environ.get("MLX_SERVING_REQUIRE_NATIVE") == "1":
            pytest.fail(f"native kernels are required, but: {native.why()}")
        pytest.skip(f"native kernels are not available: {native.why()}")
    import mlx.core as mx

    mx.set_default_device(mx.Device(mx.cpu))


def isas() -> list[str]:
    """The instruction sets that this CPU runs; one empty name where there are no kernels."""
    from mlx_serving.runtime import native
    from mlx_serving.runtime.native import _load

    return str(_load.require().isas()).split(",") if native.available() else [""]


@pytest.fixture(params=isas())
def isa(request: pytest.FixtureRequest, kernels: None):
    from mlx_serving.runtime.native import _load

    assert _load.require().force_isa(request.param)
    yield request.param
    _load.require().force_isa("")
