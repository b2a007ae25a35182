"""Bytes on the wire: what a slow, large or wrong client is told, and what it leaves behind."""

from __future__ import annotations

import contextlib
import json
import re
import select
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from mlx_serving.types import TokenEvent

BODY = json.dumps({"prompt": "x"}).encode()
POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(BODY)
GET = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
SHORT = {"header_timeout_s": 0.2, "body_timeout_s": 0.2}


@contextlib.contextmanager
def wire(server: Any) -> Iterator[socket.socket]:
    host, port = server.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as sock:
        yield sock


def until_closed(sock: socket.socket) -> bytes:
    """Everything the server says until it closes."""
    said = b""
    with contextlib.suppress(ConnectionResetError):
        while data := sock.recv(65536):
            said += data
    return said


def answer(sock: socket.socket) -> bytes:
    """One answer that has a content-length."""
    said = b""
    while b"\r\n\r\n" not in said:
        said += sock.recv(65536) or pytest.fail(f"closed after {said!r}")
    head, _, body = said.partition(b"\r\n\r\n")
    (length,) = [
        int(v)
        for k, _, v in (line.partition(b":") for line in head.split(b"\r\n"))
        if k == b"content-length"
    ]
    while len(body) < length:
        body += sock.recv(65536) or pytest.fail("closed within the body")
    return head + b"\r\n\r\n" + body


def persist(attempt: Callable[[], bytes]) -> bytes:
    """What the server said to the first attempt that was quick enough to be a request at all."""
    return next(said for _ in range(50) if (said := attempt()))


def eventually(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it never became true"
        time.sleep(0.005)


@pytest.mark.parametrize("stream", [True, False])
def test_an_http_1_0_client_gets_no_chunks(start_server: Any, stream: bool) -> None:
    """It would take their sizes for text: a stream is told to end by the connection's end."""
    body = json.dumps({"prompt": "x", "stream": stream}).encode()
    with wire(start_server()) as sock:
        sock.sendall(POST.replace(b"1.1", b"1.0").replace(b"%d" % len(BODY), b"%d" % len(body)))
        sock.sendall(body)
        head, _, said = until_closed(sock).partition(b"\r\n\r\n")
    assert b" 200 " in head and b"connection: close" in head
    assert b"transfer-encoding" not in head.lower()
    if stream:
        assert said.startswith(b"data: {") and said.endswith(b"\n\ndata: [DONE]\n\n")
    else:
        assert b"content-length: %d" % len(said) in head


def test_a_client_that_says_nothing_is_dropped(start_server: Any) -> None:
    with wire(start_server(**SHORT)) as sock:
        assert until_closed(sock) == b""


@pytest.mark.parametrize("start", [b"", GET])
def test_a_head_that_trickles_is_ended(start_server: Any, start: bytes) -> None:
    server = start_server(**SHORT)

    def attempt() -> bytes:
        with wire(server) as sock:
            sock.sendall(start + b"GET /health HTTP/1.1\r\nX-Slow: ")
            return until_closed(sock)

    said = persist(attempt)[-400:]
    assert b"HTTP/1.1 408 " in said and b"connection: close" in said
    assert b'"request_timeout"' in said


def test_empty_lines_do_not_keep_a_connection(start_server: Any) -> None:
    with wire(start_server(header_timeout_s=2)) as sock:
        sock.sendall(GET)
        answer(sock)
        sock.sendall(b"\r\n")
        assert until_closed(sock) == b""


@pytest.mark.parametrize(
    "sent",
    [
        POST + BODY[:3],
        POST.replace(b"Content-Length: %d" % len(BODY), b"Transfer-Encoding: chunked")
        + b"3\r\nabc\r\n",
    ],
)
def test_a_body_that_trickles_is_ended(start_server: Any, gateway: Any, sent: bytes) -> None:
    server = start_server(**SHORT)

    def attempt() -> bytes:
        with wire(server) as sock:
            sock.sendall(sent)
            return until_closed(sock)

    assert persist(attempt).startswith(b"HTTP/1.1 408 ")
    assert gateway.requests == []


def test_a_long_answer_outlives_the_limits_of_its_request(start_server: Any, gateway: Any) -> None:
    """A beginning of a next request, sent meanwhile, does not end it either."""
    gateway.script = lambda request: ["hang"]
    server = start_server(**SHORT)

    def attempt() -> bytes:
        with wire(server) as sock:
            before = len(gateway.generations)
            sock.sendall(POST + BODY + b"GET /hea")
            eventually(lambda: len(gateway.generations) > before or _is_closed(sock))
            if _is_closed(sock):
                return b""
            time.sleep(0.45)  # over every limit
            gateway.generations[-1]._steps = []
            server._loop.call_soon_threadsafe(gateway.generations[-1]._wake.set)
            return until_closed(sock)

    said = persist(attempt)
    assert said.startswith(b"HTTP/1.1 200 ") and b"HTTP/1.1 408 " in said


def _is_closed(sock: socket.socket) -> bool:
    readable, _, _ = select.select([sock], [], [], 0)
    return bool(readable)


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/1.1\r\nX-Big: " + b"x" * 3000,
        b"GET /" + b"x" * 3000,
        b"GET /health HTTP/1.1\r\n" + b"X-Many: 1\r\n" * 200,
        b"GET /health HTTP/1.1\r\n" + b"X-Many: 1\r\n" * 150 + b"\r\n",
        b"GET /health HTTP/1.1\r\nX-Big: " + b"x" * 3000 + b"\r\n\r\n",
    ],
    ids=["header", "url", "unended", "many", "whole"],
)
def test_a_head_that_is_too_large_is_refused(start_server: Any, head: bytes) -> None:
    with wire(start_server(max_header_bytes=2048)) as sock:
        sock.sendall(head)
        said = until_closed(sock)
    assert said.startswith(b"HTTP/1.1 431 ")
    assert json.loads(said.partition(b"\r\n\r\n")[2])["error"]["code"] == "headers_too_large"


@pytest.mark.parametrize(
    "junk",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"EHLO example.org\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nNo colon\r\n\r\n",
        b"CONNECT example.org:443 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
    ],
)
def test_what_is_not_http_is_told_so(start_server: Any, gateway: Any, junk: bytes) -> None:
    server = start_server()
    with wire(server) as sock:
        sock.sendall(junk)
        said = until_closed(sock)
    assert said.startswith(b"HTTP/1.1 400 ") and b"bad_http" in said
    assert httpx.get(server.address + "/health").status_code == 200


def test_an_upgrade_is_answered_in_http_1(start_server: Any) -> None:
    """Java's client asks for HTTP/2 this way, and goes on with what it gets."""
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMA\r\n"
    with wire(start_server()) as sock:
        for request in (GET, POST):
            head, end = request[:-2], request[-2:]
            sock.sendall(head + upgrade + end + (BODY if request is POST else b""))
            assert answer(sock).startswith(b"HTTP/1.1 200 ")
        sock.sendall(GET)
        assert answer(sock).startswith(b"HTTP/1.1 200 ")


def test_connections_are_bounded(start_server: Any) -> None:
    server = start_server(max_connections=2)
    with wire(server) as one, wire(server) as two:
        for sock in (one, two):
            sock.sendall(GET)
            answer(sock)
        with wire(server) as third:
            said = until_closed(third)
        assert said.startswith(b"HTTP/1.1 503 ") and b"retry-after: 1" in said
        one.sendall(GET)
        assert answer(one).startswith(b"HTTP/1.1 200 ")
    eventually(lambda: httpx.get(server.address + "/health").status_code == 200)


def test_a_half_closed_socket_frees_its_row(start_server: Any, gateway: Any) -> None:
    gateway.script = lambda request: ["hang"]
    with wire(start_server()) as sock:
        sock.sendall(POST + BODY)
        eventually(lambda: len(gateway.generations) == 1)
        sock.shutdown(socket.SHUT_WR)
        eventually(lambda: gateway.generations[0].ended)


def test_a_client_that_does_not_read_is_cut_off(start_server: Any, gateway: Any) -> None:
    gateway.script = lambda request: (
        [[TokenEvent(choice=0, text="x" * 1000, token_ids=[1])]] * 50_000
    )
    body = json.dumps({"prompt": "x", "stream": True}).encode()
    with wire(start_server(write_timeout_s=0.2)) as sock:
        sock.sendall(POST.replace(b"%d" % len(BODY), b"%d" % len(body)) + body)
        eventually(lambda: len(gateway.generations) == 1)
        eventually(lambda: gateway.generations[0].ended or gateway.generations[0].cancelled)


def test_what_follows_an_answer_is_bounded(start_server: Any) -> None:
    """A request may be answered before its body has come; the rest may not come for ever."""
    with wire(start_server(max_body_bytes=1024)) as sock:
        sock.sendall(POST.replace(b"%d" % len(BODY), b"%d" % 10**12))
        assert answer(sock).startswith(b"HTTP/1.1 413 ")
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            for _ in range(10_000):
                sock.sendall(b"x" * 65536)


def test_many_requests_in_one_segment(start_server: Any) -> None:
    with wire(start_server()) as sock:
        sock.sendall(GET * 50 + GET.replace(b"Host", b"Connection: close\r\nHost"))
        assert until_closed(sock).count(b"HTTP/1.1 200 ") == 51


GOOD = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    "rest",
    [
        b"junk\r\n\r\n",
        b"POST /v1/models HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nno size\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
    ],
)
def test_what_came_before_a_fault_is_answered_first(start_server: Any, rest: bytes) -> None:
    with wire(start_server()) as sock:
        sock.sendall(GOOD + GOOD + rest)
        said = until_closed(sock)
    statuses = re.findall(rb"HTTP/1.1 (\d+) ", said)
    assert statuses[:2] == [b"200", b"200"] and statuses[2:] in ([b"400"], [b"431"])
