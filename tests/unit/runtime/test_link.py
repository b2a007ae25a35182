"""The bell: whoever waits, or is about to, hears of it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from mlx_serving.runtime.link import Link

GUARD_S = 60.0


@pytest.fixture
def link() -> Iterator[Link]:
    ours, theirs = socket.socketpair()
    link = Link(theirs)
    with ours, theirs:
        yield link
        link.close()


def test_a_ring_before_the_wait_is_heard_once(link: Link) -> None:
    for _ in range(3):
        link.ring()
    assert link.wait(GUARD_S)
    assert not link.wait(0.0)


def test_a_ring_wakes_who_waits(link: Link) -> None:
    heard = []
    waiting = threading.Thread(target=lambda: heard.append(link.wait(GUARD_S)))
    waiting.start()
    link.ring()
    waiting.join(GUARD_S)
    assert heard == [True]


def test_nobody_has_to_listen(link: Link) -> None:
    for _ in range(100_000):
        link.ring()
    assert link.wait(0.0) or link.wait(0.0)
    link.close()
    link.ring()
