"""What a cgroup's quota, v1 or v2, makes of the number of threads, and what threads do without work."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_serving.runtime import native
from mlx_serving.runtime.native import _load, ops

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


def others() -> list[str]:
    """The states of this process's other threads: R runs or would, S sleeps."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            if task.name != str(threading.get_native_id()):
                found.append((task / "stat").read_text().rpartition(")")[2].split()[0])
    return found


def test_helpers_park_when_there_is_nothing_to_do() -> None:
    packed = ops.pack_dense(mx.random.normal((4096, 256)))
    x = mx.random.normal((64, 256))
    threads = native.threads()
    native.set_threads(4)
    try:
        for _ in range(3):
            mx.eval(ops.linear(x, packed))
    finally:
        native.set_threads(threads)
    assert len(others()) >= 3
    # One that spun on would be seen running for ever; another test's thread may run now and then.
    asleep = 0
    while asleep < 20:
        asleep = asleep + 1 if set(others()) == {"S"} else 0
        time.sleep(0.005)


def test_threads_are_what_affinity_allows() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert _load.require().available_threads() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert 1 <= _load.require().available_threads() <= len(allowed)
