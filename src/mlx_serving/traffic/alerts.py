"""Telling people outside: changes of service levels to a webhook, grouped and boundedly often.

A level that is violated opens an alert, and one that is kept again resolves it; what lies between,
and what remedies do, goes along in the text.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Any, Literal

from mlx_serving.config import AlertFormat
from mlx_serving.traffic.levels import LevelChanged

log = logging.getLogger(__name__)

GROUP_S = 5.0
"""Changes within that time go out together."""
MIN_INTERVAL_S = 30.0
"""Between two messages."""
MAX_PENDING = 100
ATTEMPTS = 3
TIMEOUT_S = 10.0

Post = Callable[[str, Any], Awaitable[int]]
"""(URL, JSON) → HTTP status; raises OSError when nobody answers."""


def payloads(
    form: AlertFormat, changes: list[LevelChanged], *, key: str = "", host: str = ""
) -> list[Any]:
    """What to post: for PagerDuty (Events API v2) one event an objective, else one message.

    Args:
        key: PagerDuty's routing key.
        host: who says it.
    """
    match form:
        case "slack":
            return [{"text": "\n".join(f"*{host}* {change.line}" for change in changes)}]
        case "pagerduty":
            latest = {change.objective: change for change in changes}
            return [_pagerduty(change, key, host) for change in latest.values()]
        case "json":
            events = [_plain(change) for change in changes]
            return [{"source": host, "changes": events}]


def _plain(change: LevelChanged) -> dict[str, Any]:
    return {
        "objective": change.objective,
        "state": change.state,
        "before": change.before,
        "status": _status(change),
        "burn_short": change.burn_short,
        "burn_long": change.burn_long,
        "now": change.now,
        "remedy": change.remedy,
        "act": change.act,
        "text": change.line,
    }


def _status(change: LevelChanged) -> Literal["firing", "resolved"]:
    """A level that is at risk is kept: what is said of it then, as that a remedy is taken back, opens
    no alert."""
    return "firing" if change.state in ("violated", "recovering") else "resolved"


def _pagerduty(change: LevelChanged, key: str, host: str) -> dict[str, Any]:
    event: dict[str, Any] = {
        "routing_key": key,
        "event_action": "resolve" if _status(change) == "resolved" else "trigger",
        "dedup_key": f"{host}/{change.objective}",
    }
    if event["event_action"] == "trigger":
        severity = "critical" if change.state == "violated" else "warning"
        event["payload"] = {"summary": change.line, "source": host, "severity": severity}
    return event


class Alerts:
    """Posts changes from a task of its own; a webhook that fails costs a log line and no more.

    Args:
        url: where to; PagerDuty's routing key stands behind a `#`.
        post: `post_json`, or a test's own.
        on_drop: an alert is lost, since too many wait or nobody takes it.
    """

    def __init__(
        self,
        url: str,
        form: AlertFormat,
        post: Post | None = None,
        *,
        group_s: float = GROUP_S,
        min_interval_s: float = MIN_INTERVAL_S,
        on_drop: Callable[[], None] = lambda: None,
    ) -> None:
        self._url, _, self._key = url.partition("#")
        self._form = form
        self._post = post or post_json
        self._group_s = group_s
        self._min_interval_s = min_interval_s
        self._pending: list[LevelChanged] = []
        self._on_drop = on_drop
        self._task: asyncio.Task[None] | None = None

    def add(self, change: LevelChanged) -> None:
        """Have it posted soon. That a level is at risk, or no longer, is no alert."""
        if {change.state, change.before} == {"at_risk", "ok"}:
            return
        if len(self._pending) >= MAX_PENDING:
            self._on_drop()
            return
        self._pending.append(change)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._send(), name="alerts")

    async def close(self) -> None:
        """Post what is pending now, once."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._flush(attempts=1)

    async def _send(self) -> None:
        while self._pending:
            await asyncio.sleep(self._group_s)
            await self._flush(ATTEMPTS)
            await asyncio.sleep(self._min_interval_s)

    async def _flush(self, attempts: int) -> None:
        changes, self._pending = self._pending, []
        if not changes:
            return
        for payload in payloads(self._form, changes, key=self._key, host=socket.gethostname()):
            await self._deliver(payload, attempts)

    async def _deliver(self, payload: Any, attempts: int) -> None:
        why = ""
        for attempt in range(attempts):
            try:
                status = await self._post(self._url, payload)
            except OSError as error:
                why = str(error) or type(error).__name__
            else:
                if status < 400:
                    return
                why = f"it answered {status}"
            if attempt + 1 < attempts:
                await asyncio.sleep(min(self._min_interval_s, 2.0**attempt))
        self._on_drop()
        log.warning("an alert could not be delivered: %s", why)


async def post_json(url: str, payload: Any) -> int:
    """HTTP status. Raises OSError when nobody answers."""
    import httpx  # only where there are alerts

    try:
        async with httpx.AsyncClient(timeout=TIMEOUT_S) as http:
            return (await http.post(url, json=payload)).status_code
    except httpx.HTTPError as error:
        raise OSError(str(error) or type(error).__name__) from None
