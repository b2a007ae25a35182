"""`mlx-serving reload`, with a real server and a real client."""

from __future__ import annotations

import json
from pathlib import Path

import httpx

import commands
from contract.served import serving


def reload(url: str, *args: str) -> commands.Job:
    return commands.run("reload", "--url", url, *args)


def test_the_file_is_read_again(scripted, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("max_queue: 5\nlog_level: warning\n")
    served = serving([scripted(text="a" * 40)], "--config", str(file))
    with served as url, httpx.Client(base_url=url, timeout=60) as http:

        def now() -> dict[str, object]:
            return http.get("/v1/admin/config").json()["settings"]

        assert now()["max_queue"] == 5
        assert "has these settings already" in reload(url).stderr
        file.write_text("max_queue: 7\nmax_num_seqs: 2\nmax_tokens: 3\nlog_level: warning\n")
        job = reload(url)
        assert job.returncode == 0, job.stderr
        assert job.stderr.splitlines() == [
            "max_queue is 7 now",
            "max_tokens is 3 now",
            "max_num_seqs differs, and changes with a restart",
        ]
        assert now()["max_queue"] == 7 and now()["max_num_seqs"] == 16
        assert now()["max_tokens"] == 3
        file.write_text("max_queue: 9\nmax_tokens: none or so\n")
        job = reload(url, "--json")
        assert job.returncode == 1
        wrong = json.loads(job.stdout)
        assert wrong["event"] == "error" and "serve.yaml:2: max_tokens" in wrong["message"]
        assert now()["max_queue"] == 7


def test_it_says_when_nobody_is_there() -> None:
    job = reload("http://127.0.0.1:9")
    assert job.returncode == 1 and "no server of ours answers" in job.stderr
