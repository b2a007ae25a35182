from __future__ import annotations

import asyncio
import json
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from mlx_serving.traffic.alerts import MAX_PENDING, Alerts, payloads, post_json
from mlx_serving.traffic.levels import LevelChanged
from unit.traffic.conftest import settled


def change(state="violated", before="at_risk", objective="ttft p95 < 1s", **fields) -> LevelChanged:
    return LevelChanged(
        objective=objective, state=state, before=before, burn_short=4.0, burn_long=2.5, **fields
    )


def test_one_message_for_a_group():
    (plain,) = payloads("json", [change(), change("ok", "recovering")], host="here")
    assert [one["status"] for one in plain["changes"]] == ["firing", "resolved"]
    (slack,) = payloads("slack", [change(), change(remedy="shed_low", act="applied")], host="here")
    assert "is violated" in slack["text"] and "shed_low applied" in slack["text"]


def test_pagerduty_is_told_to_trigger_and_to_resolve():
    opened, other = payloads(
        "pagerduty", [change(), change(objective="errors < 1%")], key="k", host="here"
    )
    assert opened["event_action"] == "trigger" and opened["payload"]["severity"] == "critical"
    assert opened["routing_key"] == "k" and opened["dedup_key"] != other["dedup_key"]
    (closed,) = payloads("pagerduty", [change(), change("ok", "recovering")], key="k", host="here")
    assert closed["event_action"] == "resolve" and closed["dedup_key"] == opened["dedup_key"]


def test_a_remedy_that_is_taken_back_opens_no_alert():
    taken_back = change("at_risk", "at_risk", remedy="shed_low", act="taken_back")
    (event,) = payloads("pagerduty", [taken_back], key="k", host="here")
    assert event["event_action"] == "resolve"
    (plain,) = payloads("json", [taken_back], host="here")
    assert [one["status"] for one in plain["changes"]] == ["resolved"]


class Webhook:
    """Notes what is posted; `answers` are statuses or errors, the last one for good."""

    def __init__(self, *answers: int | OSError) -> None:
        self.answers = list(answers) or [200]
        self.posted: list[object] = []
        self.heard = asyncio.Event()

    async def __call__(self, url: str, payload: object) -> int:
        self.posted.append(payload)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        self.heard.set()
        if isinstance(answer, OSError):
            raise answer
        return answer


async def test_changes_go_out_together():
    hook = Webhook()
    alerts = Alerts("http://x", "json", hook, group_s=0.0, min_interval_s=0.0)
    alerts.add(change("at_risk", "ok"))  # not yet an alert
    alerts.add(change())
    alerts.add(change("recovering", "violated"))
    async with asyncio.timeout(120):
        await hook.heard.wait()
    await alerts.close()
    assert [len(one["changes"]) for one in hook.posted] == [2]


async def test_a_level_that_was_never_violated_is_not_told_of():
    hook = Webhook()
    alerts = Alerts("http://x", "json", hook, group_s=1000.0)
    alerts.add(change("at_risk", "ok"))
    alerts.add(change("ok", "at_risk"))
    await alerts.close()
    assert hook.posted == []


async def test_messages_keep_their_distance():
    hook = Webhook()
    alerts = Alerts("http://x", "json", hook, group_s=0.0, min_interval_s=1000.0)
    alerts.add(change())
    async with asyncio.timeout(120):
        await hook.heard.wait()
    for state, before in (("recovering", "violated"), ("ok", "recovering")):
        alerts.add(change(state, before))
        await settled()
    assert len(hook.posted) == 1  # until the interval is over
    await alerts.close()
    assert [len(one["changes"]) for one in hook.posted] == [1, 2]


async def test_what_is_pending_is_told_at_the_end():
    hook = Webhook()
    alerts = Alerts("http://x", "json", hook, group_s=1000.0)
    alerts.add(change())
    await alerts.close()
    assert len(hook.posted) == 1


@pytest.mark.parametrize("answer", [500, OSError("nobody there")])
async def test_a_webhook_that_fails_is_tried_again_and_costs_no_more(answer, caplog):
    hook, dropped = Webhook(answer), []
    alerts = Alerts(
        "http://x",
        "json",
        hook,
        group_s=0.0,
        min_interval_s=0.0,
        on_drop=partial(dropped.append, 1),
    )
    alerts.add(change())
    async with asyncio.timeout(120):
        assert alerts._task is not None
        await alerts._task
    assert len(hook.posted) == 3 and len(dropped) == 1
    assert "could not be delivered" in caplog.text


async def test_alerts_are_bounded():
    dropped: list[int] = []
    on_drop = partial(dropped.append, 1)
    alerts = Alerts("http://x", "json", Webhook(), group_s=1000.0, on_drop=on_drop)
    for _ in range(MAX_PENDING + 5):
        alerts.add(change())
    assert len(dropped) == 5
    await alerts.close()


async def test_over_http():
    bodies: list[object] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(202)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/hook"
        assert await post_json(url, {"a": 1}) == 202
    finally:
        server.shutdown()
        server.server_close()
    assert bodies == [{"a": 1}]
    with pytest.raises(OSError):
        await post_json(url, {})
