"""`mlx-serving flag` against a real server over its socket."""

from __future__ import annotations

import json

import httpx

import commands
from contract.served import serving


def test_flags_are_listed_and_reach_another_share_while_the_server_runs(scripted) -> None:
    models = [
        scripted(name=name, text=letter * 40) for name, letter in (("old", "a"), ("new", "b"))
    ]
    flag = "fast=50% model=old use=new"
    body = {"model": "old", "prompt": "x", "max_tokens": 4, "temperature": 0}
    with serving(models, "--feature-flags", flag) as url:

        def run(*args: str) -> commands.Job:
            return commands.run("flag", *args, "--url", url)

        def reached(http: httpx.Client) -> set[int]:
            found = set()
            for user in range(16):
                answer = http.post("/v1/completions", json={**body, "user": f"user-{user}"})
                text, on = answer.json()["choices"][0]["text"], "x-mlx-flags" in answer.headers
                assert text == ("bbbb" if on else "aaaa")
                if on:
                    assert answer.headers["x-mlx-flags"] == "fast"
                    assert answer.headers["x-mlx-variant"] == "new"
                    found.add(user)
            return found

        with httpx.Client(base_url=url, timeout=120) as http:
            half = reached(http)
            assert run("set", "fast", "100").returncode == 0
            assert 0 < len(half) < len(reached(http)) == 16
            assert run("set", "fast", "0").returncode == 0
            assert reached(http) == set()
        listed = json.loads(run("list", "--json").stdout)
        assert [(f["name"], f["percent"], f["use"]) for f in listed] == [("fast", 0.0, "new")]
        assert "fast" in run("list").stdout
        unknown = run("set", "slow", "5")
        assert unknown.returncode == 1 and "no feature flag 'slow'" in unknown.stderr
        assert run("set", "fast", "101").returncode == 2
