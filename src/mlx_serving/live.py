"""The settings in force, and how they change while the server runs.

`change` takes single settings (the admin API), `reload` all of them anew from where they came from.
Both check everything before anything is done; what cannot change at run time is named.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from mlx_serving.config import FIELDS, SECRETS, Config, unknown
from mlx_serving.config_sources import override
from mlx_serving.errors import ConfigError, InvalidRequest

log = logging.getLogger(__name__)

T = TypeVar("T")

LIVE = frozenset(
    {
        "admin_key",
        "alert_format",
        "alert_webhook",
        "allowed_host",
        "api_key",
        "api_keys_file",
        "baselines_file",
        "body_timeout_s",
        "class_queue",
        "coalesce",
        "coalesce_subscribers",
        "concurrency_limit",
        "cors_origin",
        "drain_timeout_s",
        "feature_flags",
        "find_knee",
        "first_token_timeout_s",
        "header_timeout_s",
        "keep_alive_s",
        "load_timeout_s",
        "log_level",
        "max_body_bytes",
        "max_header_bytes",
        "max_queue",
        "max_tokens",
        "max_wait_s",
        "memory_wait_s",
        "model_aliases",
        "pin",
        "ping_interval_s",
        "prefetch",
        "queue_timeout_s",
        "request_timeout_s",
        "response_cache",
        "response_cache_bytes",
        "response_cache_entries",
        "response_cache_tokens",
        "response_cache_ttl_s",
        "response_cache_url",
        "resume_timeout_s",
        "short_jobs_first",
        "silence_timeout_s",
        "slo",
        "slo_dry_run",
        "slo_remedies",
        "step_limit_ms",
        "step_timeout_s",
        "unknown_fields",
        "usual_num_seqs",
        "watch_drift",
        "worker_rss_limit_bytes",
        "write_timeout_s",
    }
)
"""Settings whose owners take a new value while requests run. The others need a restart."""

HIDDEN = SECRETS | {"alert_webhook", "response_cache_url"}
"""Never shown: keys, and URLs that may carry one."""

Apply = Callable[[], Awaitable[Sequence[str] | None]]
Prepare = Callable[[Config], Apply]
"""Checks a configuration against the one in force (raises ConfigError); what it returns applies it. On
a reload the configuration may be the same: files that it names may say something else now, and applying
returns the settings that name them."""


class Change(msgspec.Struct, frozen=True):
    """What a change did."""

    applied: Mapping[str, Any]
    """The new value of each setting that is another now."""
    needs_restart: tuple[str, ...] = ()
    """Settings that are another where they come from, and stay as they are until a restart."""


class LiveSettings:
    """Args: read: where the settings come from, for `reload`; blocks. None: they came from code."""

    def __init__(self, config: Config, read: Callable[[], Config] | None = None) -> None:
        self.config = config
        self.read = read
        self._owners: list[Prepare] = []
        self._changing = asyncio.Lock()

    def own(self, prepare: Prepare) -> None:
        """Whoever holds settings is asked before anything changes, and told in order of coming."""
        self._owners.append(prepare)

    def shown(self) -> dict[str, Any]:
        """Every setting in force; of secrets, whether they are set."""
        return {name: shown(self.config, name) for name in FIELDS}

    async def change(self, values: Mapping[str, Any]) -> Change:
        """All of `values`, or none. Raises InvalidRequest naming the first setting at fault."""
        for name in values:
            if name not in FIELDS:
                raise InvalidRequest(unknown(name[:200], "setting") + ".", param=name[:64])
        async with self._changing:
            with_values = _checked(lambda: override(self.config, values))
            for name in differences(self.config, with_values):
                if name not in LIVE:
                    raise InvalidRequest(
                        f"'{name}' cannot change while the server runs: set it where the server "
                        "gets its settings, and restart it.",
                        param=name,
                        code="needs_restart",
                    )
            if with_values == self.config:
                return Change({})
            return await self._take(with_values, ())

    async def reload(self) -> Change:
        """Read the settings again and take over what differs. Raises InvalidRequest, with nothing done,
        where they are wrong."""
        if self.read is None:
            raise InvalidRequest("This server's settings came from code, not from a file.")
        async with self._changing:
            read = self.read
            found = await asyncio.to_thread(_checked, read)
            new = differences(self.config, found)
            live = {name: getattr(found, name) for name in new if name in LIVE}
            wanted = msgspec.structs.replace(self.config, **live)
            return await self._take(wanted, tuple(name for name in new if name not in LIVE))

    async def _take(self, wanted: Config, needs_restart: tuple[str, ...]) -> Change:
        names = differences(self.config, wanted)
        applies = _checked(lambda: [prepare(wanted) for prepare in self._owners])
        for apply in applies:
            names += [name for name in await apply() or () if name not in names]
        self.config = wanted
        applied = {name: shown(wanted, name) for name in names}
        for name, value in applied.items():
            log.info("%s is %s now", name, msgspec.json.encode(value).decode())
        return Change(applied, needs_restart)


def differences(old: Config, new: Config) -> list[str]:
    """The settings that are not the same."""
    return [name for name in FIELDS if getattr(old, name) != getattr(new, name)]


def shown(config: Config, name: str) -> Any:
    value = getattr(config, name)
    if name in HIDDEN and value:
        return "(not shown)"
    return msgspec.to_builtins(value)


def differ(old: Config, new: Config, *beginnings: str) -> bool:
    """Whether a setting whose name begins so is another."""
    return any(name.startswith(beginnings) for name in differences(old, new))


def _checked(make: Callable[[], T]) -> T:
    try:
        return make()
    except ConfigError as error:
        raise InvalidRequest(error.message, param=error.param, code=error.code) from error
