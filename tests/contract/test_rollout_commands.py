"""`mlx-serving canary` and `ab` against a real server over its socket."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

import commands
from contract.served import serving

Run = Callable[..., commands.Job]


@pytest.fixture(scope="module")
def server(scripted_once, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """URL of a server of two scripted models, and the file of its rollouts."""
    models = [
        scripted_once(name=name, text=text * 40) for name, text in (("old", "a"), ("new", "b"))
    ]
    file = tmp_path_factory.mktemp("kept") / "rollouts.json"
    with serving(models, "--rollouts-file", str(file)) as url:
        yield url, file


@pytest.fixture
def run(server) -> Run:
    return lambda *args: commands.run(*args, "--url", server[0])


def test_a_canary_by_hand(server, run: Run) -> None:
    url, file = server
    started = run("canary", "start", "old", "new", "--stages", "50,100", "--json")
    assert started.returncode == 0, started.stderr
    assert json.loads(started.stdout)["share"] == 0.5

    body = {"model": "old", "prompt": "x", "max_tokens": 4, "temperature": 0}
    with httpx.Client(base_url=url, timeout=120) as http:
        seen = set()
        for user in range(30):
            headers = {"x-session-id": f"user-{user}"}
            answer = http.post("/v1/completions", json=body, headers=headers)
            text = answer.json()["choices"][0]["text"]
            assert text == ("bbbb" if answer.headers.get("x-mlx-variant") == "new" else "aaaa")
            again = http.post("/v1/completions", json={**body, "user": f"user-{user}"})
            assert again.json()["choices"][0]["text"] == text
            seen.add(text)
        assert seen == {"aaaa", "bbbb"}

        shown = run("canary", "status", "canary")
        assert shown.returncode == 0, shown.stderr
        assert "share     50 %" in shown.stdout and "1 of 2" in shown.stdout
        assert "canary" in run("canary", "status").stdout

        assert run("canary", "promote", "canary").returncode == 0
        assert http.post("/v1/completions", json=body).headers["x-mlx-variant"] == "new"
        assert run("canary", "rollback", "canary").returncode == 0
        assert "x-mlx-variant" not in http.post("/v1/completions", json=body).headers
    assert json.loads(file.read_text())[0]["status"] == "rolled_back"
    assert run("canary", "remove", "canary").returncode == 0
    assert json.loads(file.read_text()) == []


def test_an_ab_report(server, run: Run) -> None:
    counted = ("--share", "50", "--metrics", "error,ttft,score")
    assert run("ab", "start", "old", "new", "--name", "t", *counted).returncode == 0
    early = run("ab", "report", "t", "--plot")
    assert early.returncode == 1 and "not enough answers" in early.stderr
    body = {"model": "old", "prompt": "x", "max_tokens": 4, "temperature": 0}
    with httpx.Client(base_url=server[0], timeout=120) as http:
        for user in range(70):
            headers = {"x-session-id": f"user-{user}"}
            http.post("/v1/completions", json=body, headers=headers).raise_for_status()
        for model, score in (("old", 0.9), ("new", 0.4)) * 25:
            said = {"model": model, "score": score}
            http.post("/v1/rollouts/t/scores", json=said).raise_for_status()
        refused = http.post("/v1/rollouts/t/scores", json={"model": "old", "score": 2})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "score"
    report = run("ab", "report", "t")
    assert "ttft" in report.stdout and "always within" in report.stdout
    assert "90.0 %" in report.stdout and "-50.0 points" in report.stdout
    plot = run("ab", "report", "t", "--plot")
    assert plot.returncode == 0 and "bound at every look" in plot.stdout
    file = server[1].with_name("t.png")
    drawn = run("ab", "report", "t", "--png", str(file))
    assert drawn.returncode == 0, drawn.stderr
    assert file.read_bytes().startswith(b"\x89PNG") and "t.png is written" in drawn.stderr
    listed = json.loads(run("ab", "status", "--json").stdout)
    assert [sum(one["samples"]) for one in listed] == [70]
    assert run("ab", "stop", "t").returncode == 0


def test_what_is_wrong_is_named(run: Run) -> None:
    unknown = run("canary", "start", "old", "newer")
    assert unknown.returncode == 1 and "variant: Model 'newer'" in unknown.stderr
    assert run("canary", "start", "old", "new", "--stages", "10,x").returncode == 2
    share = run("canary", "start", "old", "new", "--stages", "0,100")
    assert share.returncode == 1 and "stages[0].share" in share.stderr
    missing = run("canary", "status", "none")
    assert missing.returncode == 1 and "no rollout 'none'" in missing.stderr
    nobody = commands.run("ab", "status", "--url", "http://127.0.0.1:9")
    assert nobody.returncode == 1 and "no server of ours" in nobody.stderr
