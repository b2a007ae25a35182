"""One HTTP connection: what its client may cost before, between and after requests.

    head ──▶ body ──▶ (answer) ──▶ head …
      │        │         └── unread for too long: cut off
      └────────┴── too slow: 408; too large: 431; not HTTP: 400

Each phase has a deadline, so that a client that sends or reads a byte now and then holds nothing for
long. Requests themselves are the application's business (`exchange.py`).
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Literal, assert_never

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from mlx_serving.api.exchange import openai_error
from mlx_serving.config import Config
from mlx_serving.errors import InvalidRequest, MLXServingError, Overloaded

MAX_HEADERS = 128
LINGER_S = 10.0
"""How long the rest of a request may come that has been answered already."""
LINGER_BYTES = 64 * 1024 * 1024

Phase = Literal["head", "body", "linger", "flush"]


class BadHTTP(InvalidRequest):
    code = "bad_http"


class HeadersTooLarge(InvalidRequest):
    status, code = 431, "headers_too_large"


class TooSlow(InvalidRequest):
    status, code = 408, "request_timeout"


@dataclass(frozen=True, slots=True)
class Limits:
    max_connections: int
    max_header_bytes: int
    header_timeout_s: float
    body_timeout_s: float
    write_timeout_s: float

    @classmethod
    def of(cls, config: Config, max_files: int) -> Limits:
        """`max_files`: file descriptors that this process may have."""
        return cls(
            max_connections=min(config.max_connections, max(1, max_files - RESERVED_FILES)),
            max_header_bytes=config.max_header_bytes,
            header_timeout_s=config.header_timeout_s,
            body_timeout_s=config.body_timeout_s,
            write_timeout_s=config.write_timeout_s,
        )


RESERVED_FILES = 64
"""File descriptors for everything that is no client."""


class Connection(HttpToolsProtocol):
    """uvicorn's protocol, with limits."""

    def __init__(self, *args: Any, limits: Limits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._refused = False
        self._refusal: MLXServingError | None = None
        """What is said once the requests before it are answered."""
        self._unanswered = 0
        self._in_body = False
        self._head_begun = False
        self._head_bytes = 0
        self._lingering_bytes = 0

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections:
            most = f"{self._limits.max_connections} connections"
            self._refuse(Overloaded(f"The server has {most}, its limit.", retry_after_s=1.0))
        else:
            self._arm("head", self._limits.header_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self._unset_keepalive_if_required()
        if self._write_timer is not None:
            self._write_timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        while data and not self._refused:
            if not self._in_body:
                self._head_bytes += len(data)
            data = self._feed(data)
        if self._refused or self._in_body:
            return
        if self._head_bytes > self._limits.max_header_bytes:
            self._refuse(self._headers_too_large())
        elif self._timer is None and (self._head_begun or self._between_requests):
            self._arm("head", self._limits.header_timeout_s)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(
                self._limits.write_timeout_s, self.transport.abort
            )

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    # The parser's callbacks

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_begun = True

    def on_headers_complete(self) -> None:
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > self._limits.max_header_bytes or len(self.headers) > MAX_HEADERS:
            self._refuse(self._headers_too_large())
            return
        if self.parser.should_upgrade():
            return  # _feed has it parsed again
        super().on_headers_complete()
        if self.scope["http_version"] == "1.0":
            _send_without_chunks(self.cycle)
        self._unanswered += 1
        self._head_begun, self._head_bytes, self._in_body = False, 0, True
        self._lingering_bytes = 0
        self._arm("body", self._limits.body_timeout_s)

    def on_body(self, body: bytes) -> None:
        if self._refused:
            return
        if self.cycle.response_complete:
            self._lingering_bytes += len(body)
            if self._lingering_bytes > LINGER_BYTES:
                self.transport.abort()
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._refused or self.parser.should_upgrade():
            return
        self._in_body = False
        self._disarm()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        self._unanswered -= 1
        super().on_response_complete()
        if self._refusal is not None and not self._unanswered:
            self._say(self._refusal)
        elif self.transport.is_closing():
            self._arm("flush", self._limits.write_timeout_s)
        elif self._in_body:
            self._arm("linger", LINGER_S)

    def send_400_response(self, msg: str) -> None:
        self._refuse(BadHTTP(msg))

    # Deadlines

    @property
    def _between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _arm(self, phase: Phase, timeout_s: float) -> None:
        self._disarm()
        self._timer = self.loop.call_later(timeout_s, self._too_slow, phase)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self, phase: Phase) -> None:
        self._timer = None
        match phase:
            case "head" if not self._between_requests:
                # The beginning of a next request must not end this one's answer.
                self._arm("head", self._limits.header_timeout_s)
            case "head" if not self._head_begun:
                self.transport.close()
            case "head":
                self._refuse(TooSlow("The request's head did not come in time."))
            case "body" if self.cycle.response_started:
                self.transport.abort()
            case "body":
                self._refuse(TooSlow("The request's body did not come in time."))
            case "linger" | "flush":
                self.transport.abort()
            case _:
                assert_never(phase)

    # The parser

    def _feed(self, data: bytes) -> bytes:
        """Parse `data`, and return what has to be parsed yet."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            return self._decline(self.parser.get_method(), data[upgrade.args[0] :])
        except httptools.HttpParserError:
            if not self._refused:
                self._refuse(BadHTTP("This is not HTTP/1.1."))
        return b""

    def _decline(self, method: bytes, rest: bytes) -> bytes:
        """The request without its wish for another protocol: the parser leaves the body of one that
        has it unread (Java's client asks for HTTP/2 with every first request)."""
        if self._refused or method == b"CONNECT":
            if not self._refused:
                self._refuse(BadHTTP("This server is no proxy."))
            return b""
        version = self.parser.get_http_version().encode()
        self.parser = httptools.HttpRequestParser(self)
        self._head_bytes = 0
        kept = [(k, v) for k, v in self.headers if k not in (b"upgrade", b"connection")]
        lines = b"".join(b"%b: %b\r\n" % header for header in kept)
        return b"%b %b HTTP/%b\r\n%b\r\n%b" % (method, self.url, version, lines, rest)

    def _headers_too_large(self) -> HeadersTooLarge:
        return HeadersTooLarge(
            f"The request's head is over {self._limits.max_header_bytes} bytes or {MAX_HEADERS} "
            "headers, the server's limit."
        )

    def _refuse(self, error: MLXServingError) -> None:
        """Nothing more is read; what came before is answered first."""
        self._refused = True
        at_fault = self._in_body and not self.cycle.response_complete
        if at_fault and self.pipeline:
            self.pipeline.popleft()
            self._unanswered -= 1
        elif at_fault and self.cycle.response_started:
            self.transport.abort()
            return
        elif at_fault:
            self._say(error)
            return
        if self._unanswered:
            self._refusal = error
        else:
            self._say(error)

    def _say(self, error: MLXServingError) -> None:
        """Answer by ourselves and close: there is no request to hand on."""
        if self.transport.is_closing():
            return
        body = openai_error(error, "")
        retry = b"retry-after: %d\r\n" % error.retry_after_s if error.retry_after_s else b""
        phrase = HTTPStatus(error.status).phrase.encode()
        self.transport.write(
            b"HTTP/1.1 %d %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n%b"
            b"connection: close\r\n\r\n%b" % (error.status, phrase, len(body), retry, body)
        )
        self.transport.close()
        self._arm("flush", self._limits.write_timeout_s)


def _send_without_chunks(cycle: RequestResponseCycle) -> None:
    """An HTTP/1.0 client reads chunks as part of the answer: what has no length ends with the connection."""
    send, endless = cycle.send, False

    async def unchunked(message: Any) -> None:
        nonlocal endless
        if message["type"] == "http.response.start":
            endless = all(name != b"content-length" for name, _ in message["headers"])
            if endless:
                cycle.chunked_encoding = False
        elif endless:
            # It counts what is left of the length.
            cycle.expected_content_length = len(message["body"])
        await send(message)

    cycle.send = unchunked  # type: ignore[method-assign]
