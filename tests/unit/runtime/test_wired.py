from __future__ import annotations

import errno
import mmap
import re
import sys
from ctypes import addressof, c_char
from pathlib import Path

import pytest

from mlx_serving.host import Host
from mlx_serving.runtime.backend.model import Span, Weights
from mlx_serving.runtime.wired import (
    PAGE_BYTES,
    LimitMetal,
    LockPages,
    Refuse,
    Wiring,
    decide,
    whole_pages,
)

GIB = 2**30


def machine(system="Linux", macos=None, memory=16 * GIB, limit=None) -> Host:
    return Host(
        python=(3, 12),
        system=system,
        machine="arm64",
        macos=macos,
        memory_bytes=memory,
        memory_limit_bytes=limit,
    )


@pytest.mark.parametrize(
    ("device", "need", "locked", "where", "then"),
    [
        ("cpu", 2 * GIB, 4 * GIB, machine(), LockPages()),
        ("cpu", 11 * GIB, 4 * GIB, machine(), "14746 MiB can be"),
        ("cpu", 2 * GIB, 0, machine(limit=2 * GIB), "1844 MiB can be"),
        ("cpu", 1, 0, machine("Darwin"), "not locked on Darwin"),
        ("metal", 2 * GIB, 4 * GIB, machine("Darwin", (15, 1)), LimitMetal(6 * GIB)),
        ("metal", 2 * GIB, 0, machine("Darwin", (14, 7)), "macOS 15 is the first"),
        ("cuda", 2 * GIB, 0, machine(), "CUDA"),
    ],
)
def test_what_can_be_done(device, need, locked, where, then):
    decision = decide(device, need, locked, where)
    if isinstance(then, str):
        assert isinstance(decision, Refuse) and then in decision.why
    else:
        assert decision == then


def pages(*numbers: int) -> list[Span]:
    return [Span(n * PAGE_BYTES, PAGE_BYTES) for n in numbers]


def test_spans_are_rounded_to_pages_and_joined():
    page = PAGE_BYTES
    assert whole_pages([]) == []
    assert whole_pages([Span(page + 7, 1)]) == pages(1)
    assert whole_pages([Span(page, page), Span(page, page)]) == pages(1)
    spans = [Span(9 * page - 1, 2), Span(page, page), Span(2 * page, 10), Span(page + 1, 2)]
    assert whole_pages(spans) == [Span(page, 2 * page), Span(8 * page, 2 * page)]


class FakePages:
    def __init__(self, most: int = 1 << 40, error: int = errno.ENOMEM) -> None:
        self.locked: set[int] = set()
        self._most, self._error = most, error

    def lock(self, span: Span) -> None:
        wanted = self.locked | self._of(span)
        if len(wanted) * PAGE_BYTES > self._most:
            raise OSError(self._error, "mlock")
        self.locked = wanted

    def unlock(self, span: Span) -> None:
        self.locked -= self._of(span)

    def limit_bytes(self) -> int | None:
        return self._most

    def _of(self, span: Span) -> set[int]:
        assert span.address % PAGE_BYTES == span.size % PAGE_BYTES == 0
        first = span.address // PAGE_BYTES
        return set(range(first, first + span.size // PAGE_BYTES))


def on_cpu(*spans: Span) -> Weights:
    return Weights("cpu", sum(span.size for span in spans), lambda: list(spans))


def test_models_that_share_a_page_do_not_unlock_each_other():
    fake = FakePages()
    wiring = Wiring(machine, fake)
    half = PAGE_BYTES // 2
    told = wiring.wire("a", on_cpu(Span(PAGE_BYTES, PAGE_BYTES + half)))
    assert (told.bytes, told.why_not) == (2 * PAGE_BYTES, None)
    assert wiring.wire("a", on_cpu()) == told
    wiring.wire("b", on_cpu(Span(2 * PAGE_BYTES + half, PAGE_BYTES)))
    assert fake.locked == {1, 2, 3}
    assert wiring.release("a").bytes == 0 and fake.locked == {2, 3}
    assert wiring.release("a").bytes == 0 and fake.locked == {2, 3}
    wiring.release("b")
    assert fake.locked == set()


@pytest.mark.parametrize("error", [errno.ENOMEM, errno.EPERM, errno.EAGAIN])
def test_a_model_is_locked_whole_or_not_and_the_log_says_why_once(caplog, error):
    fake = FakePages(most=3 * PAGE_BYTES, error=error)
    wiring = Wiring(machine, fake)
    assert wiring.wire("small", on_cpu(*pages(1))).bytes == PAGE_BYTES
    for model_id in ("large", "larger"):
        told = wiring.wire(model_id, on_cpu(*pages(5, 7, 9)))
        assert told.bytes == 0 and "RLIMIT_MEMLOCK is 1 MiB" in (told.why_not or "")
    assert fake.locked == {1}
    assert len(caplog.records) == 1 and "large is pinned" in caplog.text
    assert wiring.release("large").why_not is None


def test_a_model_without_weights():
    assert Wiring(machine, FakePages()).wire("m", None).why_not == "it has no weights"


def on_metal(size: int) -> Weights:
    return Weights("metal", size, list)


def test_metal_s_limit_is_what_pinned_models_hold():
    limits: list[int] = []

    def set_limit(count: int) -> None:
        if count > 10:
            raise ValueError("[set_wired_limit] more than the device recommends")
        limits.append(count)

    wiring = Wiring(lambda: machine("Darwin", (15, 0)), FakePages(), set_limit)
    assert wiring.wire("a", on_metal(4)).bytes == 4
    assert wiring.wire("b", on_metal(5)).bytes == 5
    told = wiring.wire("c", on_metal(6))
    assert (told.bytes, "recommends" in (told.why_not or "")) == (0, True)
    assert wiring.release("c").bytes == 0
    wiring.release("a")
    wiring.release("b")
    assert limits == [4, 9, 5, 0]


def locked_kib() -> int:
    found = re.search(r"VmLck:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_system_locks_and_unlocks():
    with mmap.mmap(-1, 16 * PAGE_BYTES) as memory:
        first = c_char.from_buffer(memory)
        span = Span(addressof(first), 16 * PAGE_BYTES)
        wiring, before = Wiring(), locked_kib()
        told = wiring.wire("m", Weights("cpu", span.size, lambda: [span]))
        if told.why_not is None:
            assert told.bytes == span.size
            assert locked_kib() - before == span.size // 1024
        else:
            assert "mlock" in told.why_not and locked_kib() == before
        wiring.release("m")
        assert locked_kib() == before
        del first
