"""One HTTP request and its answer on raw ASGI, and OpenAI's shape of an error."""

from __future__ import annotations

import logging
import math
import re
import secrets
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any
from urllib.parse import parse_qs

import msgspec

from mlx_serving.api.port import Cancellable
from mlx_serving.errors import BodyTooLarge, Draining, InvalidRequest, MLXServingError, ServerError
from mlx_serving.unknown import left_out

Scope = MutableMapping[str, Any]
ASGIMessage = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[ASGIMessage]]
Send = Callable[[ASGIMessage], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]
ErrorShape = Callable[[MLXServingError, str], bytes]
"""An error and the request's id → the dialect's JSON."""

JSON = b"application/json"
MAX_ERROR_CHARS = 1000
MAX_LOGGED_CHARS = 100
_MAX_NAMES, _MAX_NAME_CHARS = 20, 100
_SLASHES = re.compile(r"/{2,}")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")

log = logging.getLogger(__name__)


class UnsupportedEncoding(InvalidRequest):
    status, code = 415, "unsupported_encoding"


class ClientGone(Exception):
    """The client closed the connection: nobody is left to answer."""


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first of that name, which is in lower case."""
    for key, value in scope["headers"]:
        if key == name:
            found: bytes = value
            return found
    return None


class Exchange:
    """A request's scope and channels, its id, and the status it was answered with.

    The path decides the shape of its errors; `client` is the name of its API key; a dialect sets what
    it runs under which id.
    """

    __slots__ = (
        "answered",
        "call_id",
        "client",
        "error_shape",
        "generations",
        "id",
        "method",
        "path",
        "receive",
        "scope",
        "send",
        "status",
    )

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.receive = receive
        self.send = send
        self.method: str = scope["method"]
        # Base URLs that end with a slash.
        self.path: str = _SLASHES.sub("/", scope["path"]).rstrip("/") or "/"
        self.status: int | None = None
        self.answered = False
        self.error_shape: ErrorShape = openai_error
        self.call_id: str | None = None
        self.client: str | None = None
        self.generations: Sequence[Cancellable] = ()
        given = self.header(b"x-request-id")
        # An id that could not stand in a log line is replaced, not refused.
        valid = given is not None and _REQUEST_ID.fullmatch(given) is not None
        self.id = given.decode("ascii") if valid and given else "req-" + secrets.token_hex(12)

    def header(self, name: bytes) -> bytes | None:
        return header(self.scope, name)

    def flag(self, name: str) -> bool | None:
        """`true` or `false` in the query; None: not there. Raises InvalidRequest."""
        given: list[str] | None = parse_qs(self.scope["query_string"].decode("latin-1")).get(name)
        if given is None:
            return None
        if given[-1] not in ("true", "false"):
            raise InvalidRequest(f"'{name}' must be true or false.", param=name)
        return given[-1] == "true"

    async def body(self, limit: int) -> bytes:
        """The whole body. Raises BodyTooLarge as soon as it is known to exceed `limit` bytes, and
        UnsupportedEncoding for a compressed one."""
        encoding = self.header(b"content-encoding") or b"identity"
        if encoding.lower() != b"identity":
            name = encoding.decode("latin-1")[:MAX_LOGGED_CHARS]
            raise UnsupportedEncoding(
                f"The request's body is compressed (content-encoding: {name}); send it as it is."
            )
        declared = self.header(b"content-length")
        if declared is not None and declared.isdigit() and int(declared[:20]) > limit:
            raise _too_large(limit)
        parts: list[bytes] = []
        size = 0
        while True:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            part: bytes = message.get("body", b"")
            size += len(part)
            if size > limit:
                raise _too_large(limit)
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)

    async def start(self, status: int, content_type: bytes, headers: Headers) -> None:
        self.status = status
        await self.send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [
                    (b"content-type", content_type),
                    (b"x-content-type-options", b"nosniff"),
                    (b"x-request-id", self.id.encode("ascii")),
                    *_ignored(),
                    *headers,
                ],
            }
        )

    async def respond(
        self,
        status: int,
        body: bytes,
        headers: Headers | None = None,
        content_type: bytes = JSON,
    ) -> None:
        length = (b"content-length", b"%d" % len(body))
        await self.start(status, content_type, [length, *(headers or [])])
        self.answered = True
        await self.send({"type": "http.response.body", "body": body})

    async def respond_error(self, error: MLXServingError, headers: Headers | None = None) -> None:
        headers = list(headers or [])
        self.log_failure(error)
        if error.retry_after_s is not None:
            headers.append((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after_s))))
        elif error.status < 500 and error.status != 429:
            # OpenAI's and Anthropic's clients obey it; Claude Code tries a wrong key for minutes without.
            headers.append((b"x-should-retry", b"false"))
        if error.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        await self.respond(error.status, self.error_json(error), headers)

    def log_failure(self, error: MLXServingError) -> None:
        """So that who runs the server sees what its clients do wrong, and which streams broke off. The
        message may quote what was sent: the code and the field say it without. What waiting cures is
        counted instead, unless an answer had begun."""
        begun = self.status is not None
        if error.status == 499 or (error.retry_after_s is not None and not begun):
            return
        field = re.match(r"\w*", error.param or "", re.ASCII)
        log.info(
            "[%s] %s %r -> %s %s%s",
            self.id,
            self.method,
            self.path[:MAX_LOGGED_CHARS],
            f"{self.status}, broken off:" if begun else error.status,
            error.code,
            f" ({field[0][:MAX_LOGGED_CHARS]})" if field and field[0] else "",
        )

    def error_json(self, error: MLXServingError) -> bytes:
        if len(error.message) > MAX_ERROR_CHARS:  # it quotes what was sent
            error.message = error.message[:MAX_ERROR_CHARS] + "..."
        return self.error_shape(error, self.id)


def _ignored() -> Headers:
    """What was left out of the request, where the server relaxes unknown fields."""
    if not (noted := left_out.get()):
        return []
    names = [re.sub(r"[^!-~]|,", "?", name)[:_MAX_NAME_CHARS] for name in noted[:_MAX_NAMES]]
    return [(b"x-mlx-serving-ignored", ", ".join(names).encode("ascii"))]


def openai_error(error: MLXServingError, _: str) -> bytes:
    """`{"error": {"message", "type", "param", "code"}}`."""
    return msgspec.json.encode(
        {
            "error": {
                "message": error.message,
                "type": error.type,
                "param": error.param,
                "code": error.code,
            }
        }
    )


def internal_error(request_id: str) -> ServerError:
    """What a client learns of a fault of ours; the log has the rest under the same id."""
    return ServerError(f"Internal error; the server's log has the details under {request_id}.")


def cut_short() -> Draining:
    """For requests that still run when the server has to go."""
    return Draining("The server shut down before the answer was complete.")


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"The request's body is over {limit} bytes, the server's limit.")
