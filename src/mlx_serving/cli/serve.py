"""`mlx-serving serve`: check the host, read the settings, then run the API over an engine."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable
from datetime import datetime

import msgspec

from mlx_serving import config_sources as settings
from mlx_serving import host
from mlx_serving.cli.exits import Exit
from mlx_serving.cli.flags import ServeArgs
from mlx_serving.cli.notify import Notifier
from mlx_serving.cli.say import Say
from mlx_serving.config import Config
from mlx_serving.errors import ConfigError, ModelNotFound


class Stamped(logging.Formatter):
    """Local time with its offset from UTC: a log is read beside those of other machines."""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: ARG002
        local = datetime.fromtimestamp(record.created).astimezone()
        return local.isoformat(sep=" ", timespec="milliseconds")


def run(args: ServeArgs, say: Say | None = None, machine: host.Host | None = None) -> int:
    """Serve until told to stop. Returns the exit code."""
    say = say or Say(args.json)
    findings = host.judge_host(machine or host.look())
    if not host.able(findings):
        say.unable(findings)
        return Exit.CANNOT_WORK
    try:
        config = settings.load(args.settings, file=args.config_file)
    except ConfigError as error:
        say.config_error(error)
        return Exit.USAGE
    import uvloop

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Stamped("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    logging.basicConfig(level=config.log_level.upper(), handlers=[handler])
    for chatty in ("uvicorn", "httpx"):  # theirs at info is not ours
        logging.getLogger(chatty).setLevel(max(logging.WARNING, logging.getLogger().level))
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(config, say, args))
    except ConfigError as error:
        say.config_error(error)
        return Exit.CANNOT_BIND if error.param in ("host", "port", "uds") else Exit.USAGE


async def _serve(config: Config, say: Say, args: ServeArgs) -> int:
    """The address is taken before anything is loaded, so that a port in use costs no minutes."""
    from mlx_serving.api.access import exposures
    from mlx_serving.api.app import create_app
    from mlx_serving.api.server import serve
    from mlx_serving.engine import Engine
    from mlx_serving.telemetry import events

    config = _with_files(config)
    engine = Engine(config=config, progress=say.progress())
    engine.gateway.live.read = lambda: _with_files(
        settings.load(args.settings, file=args.config_file)
    )
    give_up = asyncio.Event()

    def on_failed(event: events.ModelFailed) -> None:
        say.error(event.code, f"{event.model_id}: {event.message}")
        # A name that leads nowhere stays wrong; any other failure is retried, and /health tells.
        if event.code == ModelNotFound.code:
            give_up.set()

    engine.on(events.ModelLoaded, lambda event: say.loaded(event.info))
    engine.on(events.ModelFailed, on_failed)
    engine.on(events.WorkerDied, lambda event: say.error("worker_died", event.cause))
    manager = Notifier()
    engine.on(events.ModelLoaded, lambda event: manager.status(f"{event.info.model_id} is ready"))
    engine.on(events.WorkerDied, lambda event: manager.status(f"worker died: {event.cause}"))
    starting: list[asyncio.Task[None]] = []

    def on_started(address: str) -> None:
        gc.freeze()  # what is imported stays; no collection need look at it again
        gc.enable()
        needs_key = bool(config.api_key or config.api_keys_file)
        say.listening(address, engine.gateway.default_model(), needs_key=needs_key)
        for code, message in exposures(config):
            say.warning(code, message)
        manager.ready("loading models")
        starting.append(asyncio.create_task(engine.start(wait_ready=False)))

    app = create_app(engine.gateway)
    loop = asyncio.get_running_loop()
    # nohup has it ignored: then a closed terminal is none of our business.
    minds = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN and _has_terminal()
    loop.add_signal_handler(signal.SIGHUP, _hung_up, engine.restart, minds)
    try:
        code = await serve(
            app,
            engine.gateway,
            on_started=on_started,
            on_draining=lambda: manager.stopping(engine.gateway.live.config.drain_timeout_s),
            should_stop=give_up,
        )
    finally:
        manager.close()
        await asyncio.gather(*starting)
        await engine.stop()
    return Exit.NO_MODEL if give_up.is_set() else code


def _with_files(config: Config) -> Config:
    return msgspec.structs.replace(
        config,
        rollouts_file=config.rollouts_file or _kept(config, "rollouts"),
        baselines_file=config.baselines_file or _kept(config, "baselines"),
    )


def _kept(config: Config, what: str) -> str:
    """A file for each address, so that two servers of one home do not share what they keep."""
    from mlx_serving.catalog.home import models_home

    place = str(config.port) if config.uds is None else config.uds.strip("/").replace("/", "-")
    return str(models_home(config.home, os.environ) / f"{what}-{place}.json")


def _hung_up(restart: Callable[[], None], minds_terminal: bool) -> None:
    """SIGHUP asks for a new worker, unless it says that the terminal was closed."""
    if minds_terminal and not _has_terminal():
        os.kill(os.getpid(), signal.SIGTERM)
    else:
        restart()


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True
