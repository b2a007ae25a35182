"""What a cgroup's quota, v1 or v2, makes of the number of threads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from mlx_serving.runtime.native import _load

NONE = 1e9
Cpus = Callable[[str, Mapping[str, str]], float]


@pytest.fixture
def cpus(tmp_path: Path) -> Cpus:
    """By what /proc/self/cgroup says and what the files under the mount hold."""

    def read(membership: str, files: Mapping[str, str]) -> float:
        (tmp_path / "cgroup").write_text(membership)
        for name, text in files.items():
            (tmp_path / "mount" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "mount" / name).write_text(text)
        found: float = _load.require().cgroup_cpus(str(tmp_path / "cgroup"), f"{tmp_path}/mount")
        return found

    return read


def test_the_smallest_quota_of_v2_counts(cpus: Cpus) -> None:
    files = {"a/b/cpu.max": "300000 100000", "a/cpu.max": "150000 100000", "cpu.max": "max 100000"}
    assert cpus("0::/a/b\n", files) == 1.5


def test_v2_without_a_quota(cpus: Cpus) -> None:
    assert cpus("0::/a\n", {"a/cpu.max": "max 100000\n"}) == NONE
    assert cpus("0::/\n", {}) == NONE


@pytest.mark.parametrize("controllers", ["cpu,cpuacct", "cpu"])
def test_v1_reads_its_controllers_mount(cpus: Cpus, controllers: str) -> None:
    files = {
        f"{controllers}/a/cpu.cfs_quota_us": "50000\n",
        f"{controllers}/a/cpu.cfs_period_us": "100000\n",
    }
    assert cpus(f"12:memory:/a\n3:{controllers}:/a\n", files) == 0.5


def test_v1_without_a_quota(cpus: Cpus) -> None:
    files = {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}
    assert cpus("3:cpu:/\n", files) == NONE


@pytest.mark.parametrize("text", ["", "garbage", "0::", ":::::", "0::/gone/away"])
def test_what_cannot_be_read_limits_nothing(cpus: Cpus, text: str) -> None:
    assert cpus(text, {}) == NONE
