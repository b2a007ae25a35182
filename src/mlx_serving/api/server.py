"""Runs the application on uvicorn, over TCP or a Unix domain socket, and drains it on a signal.

The first SIGINT or SIGTERM drains: the sockets stay open, so that new requests are told 503 and
/health says draining, while running streams finish. A second one, or the deadline, cuts them.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import resource
import signal
import socket
import ssl
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn

from mlx_serving.api import browsers, tls
from mlx_serving.api.connection import Connection, Limits
from mlx_serving.api.exchange import ASGIApp
from mlx_serving.api.port import GatewayPort
from mlx_serving.config import Config
from mlx_serving.errors import ConfigError

BACKLOG = 2048
KEEP_ALIVE_S = 75
MAX_FILES = 65_536
"""File descriptors to ask for."""
FLUSH_S = 2.0
"""What the last bytes of drained streams may take to reach their clients."""
CUT_S = 0.5
"""What telling the clients of cut streams may take."""

EXIT_DRAINED = 0
EXIT_CUT = 1
"""Streams were running when a second signal or the deadline came."""

log = logging.getLogger(__name__)


async def serve(
    app: ASGIApp,
    gateway: GatewayPort,
    *,
    on_started: Callable[[str], None] | None = None,
    on_draining: Callable[[], None] | None = None,
    should_stop: asyncio.Event | None = None,
) -> int:
    """Serve until a signal (or `should_stop`), drain, and return the exit code.

    `on_started` gets the address: `http://127.0.0.1:8000`, or `unix:/run/x.sock`. Signals are
    handled in the main thread only. Raises ConfigError if the address cannot be listened on.
    """
    stops = asyncio.Queue[None](maxsize=2)
    live, config = gateway.live, gateway.live.config
    context, rules = tls.context(config), browsers.Rules(live)
    app = browsers.keeping_out(app, lambda: rules.policy)
    with _listen(config) as (listener, address), _signals(stops):
        files = _raise_file_limit()
        made = _uvicorn_config(app, lambda: Limits.of(live.config, files), context)
        server = _Server(made, lambda: on_started and on_started(address))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        watching = asyncio.create_task(_watch(should_stop, stops))
        first = asyncio.create_task(stops.get())
        try:
            await asyncio.wait({first, serving}, return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                serving.result()
            if on_draining is not None:
                on_draining()
            drained = await _drain(gateway, live.config.drain_timeout_s, stops)
            await _close(server, serving, drained=drained)
        finally:
            for task in (first, watching, serving):
                task.cancel()
            await asyncio.wait({first, watching, serving})
    return EXIT_DRAINED if drained else EXIT_CUT


async def _watch(should_stop: asyncio.Event | None, stops: asyncio.Queue[None]) -> None:
    if should_stop is not None:
        await should_stop.wait()
        _put(stops)


async def _drain(gateway: GatewayPort, timeout_s: float, stops: asyncio.Queue[None]) -> bool:
    """True when every running request finished before the deadline and a second signal."""
    log.info("draining: running requests have %.0f s; a second signal cuts them", timeout_s)
    drain = asyncio.ensure_future(gateway.drain(timeout_s))
    second = asyncio.create_task(stops.get())
    try:
        await asyncio.wait({drain, second}, return_when=asyncio.FIRST_COMPLETED)
        return drain.done() and drain.result()
    finally:
        second.cancel()
        if not drain.done():
            drain.cancel()


async def _close(server: _Server, serving: asyncio.Task[None], *, drained: bool) -> None:
    """Stop listening. Drained responses get a moment to leave, others are told and dropped."""
    if not drained:
        for task in list(server.server_state.tasks):
            task.cancel()
    server.should_exit = True
    await asyncio.wait({serving}, timeout=FLUSH_S if drained else CUT_S)
    server.force_exit = True
    await asyncio.wait({serving}, timeout=CUT_S)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, on_started: Callable[[], object]) -> None:
        super().__init__(config)
        self._on_started = on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_started()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # serve() owns the signal handlers.
        yield


def _uvicorn_config(
    app: ASGIApp, limits: Callable[[], Limits], context: ssl.SSLContext | None
) -> uvicorn.Config:
    """`limits`: of a connection that is made now."""
    config = uvicorn.Config(
        app,
        loop="none",
        http=lambda *args, **more: Connection(*args, limits=limits(), **more),  # type: ignore[arg-type]
        ws="none",
        interface="asgi3",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
    )
    config.load()
    config.ssl = context
    return config


def _raise_file_limit() -> int:
    """As many file descriptors as this process may have; macOS starts with 256."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return soft if soft != resource.RLIM_INFINITY else MAX_FILES
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError):  # the kernel's own limit may be lower
        return soft
    return wanted


@contextlib.contextmanager
def _signals(stops: asyncio.Queue[None]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    installed: list[signal.Signals] = []
    for signum in (signal.SIGINT, signal.SIGTERM):
        # Outside the main thread there are no handlers to set: should_stop is the way.
        with contextlib.suppress(ValueError, RuntimeError):
            loop.add_signal_handler(signum, _put, stops)
            installed.append(signum)
    try:
        yield
    finally:
        for signum in installed:
            loop.remove_signal_handler(signum)


def _put(stops: asyncio.Queue[None]) -> None:
    with contextlib.suppress(asyncio.QueueFull):
        stops.put_nowait(None)


@contextlib.contextmanager
def _listen(config: Config) -> Iterator[tuple[socket.socket, str]]:
    """A listening socket and its address; a Unix socket's file goes with it."""
    if config.uds is None:
        listener = _listen_tcp(config.host, config.port)
        host, port = listener.getsockname()[:2]
        scheme = "http" if config.tls_cert is None else "https"
        with listener:
            yield listener, f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
        return
    path = Path(config.uds)
    listener = _listen_uds(path)
    inode = path.stat().st_ino
    try:
        with listener:
            yield listener, f"unix:{path}"
    finally:
        # Another server may have taken the path over.
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == inode:
                path.unlink()


def _listen_tcp(host: str, port: int) -> socket.socket:
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, proto)
    except OSError as error:
        raise ConfigError(f"Cannot listen on {host}: {error.strerror}.", param="host") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Inherited: a client whose machine has vanished is noticed.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        reason = f"Cannot listen on {host}:{port}: {error.strerror}."
        raise ConfigError(reason, param="port", code=_code(error)) from None
    return listener


def _listen_uds(path: Path) -> socket.socket:
    """Bind with mode 0600, replacing the file of a server that is gone."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.exists() or path.is_symlink():
            _remove_stale(path)
        # Between bind() and a chmod() others could connect.
        mask = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(mask)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        reason = f"Cannot listen on {path}: {error.strerror or error}."
        raise ConfigError(reason, param="uds", code=_code(error)) from None
    except ConfigError:
        listener.close()
        raise
    return listener


def _code(error: OSError) -> str:
    """Only what is in use may come free, or be evaded with another port."""
    return "address_unavailable" if error.errno == errno.EADDRINUSE else "cannot_listen"


def _remove_stale(path: Path) -> None:
    if not stat.S_ISSOCK(path.lstat().st_mode):
        raise ConfigError(f"{path} exists and is no socket.", param="uds")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink()
            return
    raise ConfigError(f"Another server listens on {path}.", param="uds", code="address_unavailable")
