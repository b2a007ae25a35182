"""The examples, run as the guide says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mlx_serving.runtime import native

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.model,
    pytest.mark.skipif(not native.available(), reason=native.why()),
]


def test_a_canary_is_promoted_and_a_slowed_one_rolled_back(model_dir: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "canary.py"), str(model_dir)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    first, _, second = done.stdout.partition("canary start smollm2 smollm2-int8-slow")
    assert "status    promoted" in first and "status    rolled_back" in second
    assert "smollm2 is answered by itself again" in second
