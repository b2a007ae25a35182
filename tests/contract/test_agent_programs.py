"""Agents' own programs, from npm and PyPI, against scripted models: one calls a tool and says what it
gave, one writes a file as aider wants it.

They see no host but this one: every other goes to a proxy that nobody listens at.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from contract.served import serving

pytestmark = pytest.mark.slow

PINNED = (
    "@anthropic-ai/claude-code@2.1.197",
    "@openai/codex@0.169.0",
    "@continuedev/cli@1.5.47",
)
AIDER = "aider-chat==0.86.2"
AGENT = """\
{%- for message in messages if message.role == "system" -%}
{%- if not loop.first or messages[0] != message %}{{ raise_exception("one, and first") }}{% endif -%}
{%- endfor -%}
{%- set results = messages | selectattr("role", "equalto", "tool") | list -%}
{%- if results -%}
<think>Read it.</think>It said: {{ results[-1].content }}
{%- elif tools -%}
<think>Look first.</think>I look.
{%- for tool in tools if tool.function.name in ("Bash", "exec_command") -%}
{%- set key = "cmd" if tool.function.name == "exec_command" else "command" %}
<tool_call>
{"name": "{{ tool.function.name }}", "arguments": {"{{ key }}": "echo forty-two"}}
</tool_call>
{%- endfor -%}
{%- endif -%}
"""
"""The echoing model says its prompt, so its template decides what it answers."""
CODEX = """\
model = "agent"
model_provider = "mlx-serving"
model_context_window = 200000
check_for_update_on_startup = false
[analytics]
enabled = false
[model_providers.mlx-serving]
name = "mlx-serving"
base_url = "{url}/v1"
env_key = "AGENT_KEY"
wire_api = "responses"
request_max_retries = 0
stream_max_retries = 0
"""
CONTINUE = """\
name: local
version: 1.0.0
schema: v1
models:
  - name: agent
    provider: openai
    model: agent
    apiBase: {url}/v1
    apiKey: sekrit
    roles: [chat]
    capabilities: [tool_use]
"""
EDIT = 'Here it is.\n\nanswer.py\n```python\nprint("forty-two")\n```\n'
FLAGS = ("--model-aliases", "claude-*", "--api-key", "sekrit")


@pytest.fixture(scope="module")
def bin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("npm") is None:
        pytest.skip("Node.js is not installed")
    home = tmp_path_factory.mktemp("programs")
    quiet = ("--no-audit", "--no-fund", "--silent", "--prefix", str(home))
    if subprocess.run(["npm", "install", *quiet, *PINNED], check=False).returncode:
        pytest.skip("npm cannot install the programs here")
    return home / "node_modules"


@pytest.fixture(scope="module")
def url(scripted_once: Any) -> Iterator[str]:
    model = scripted_once("agent", mode="echo", context=200_000, chat_template=AGENT)
    coder = scripted_once("coder", text=EDIT, context=32_768)
    with serving([model, coder], *FLAGS) as url:
        yield url


@pytest.fixture(scope="module")
def aider(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if sys.version_info >= (3, 13):
        pytest.skip("aider does not run on this Python")
    home = tmp_path_factory.mktemp("aider")
    venv.create(home, with_pip=True)
    install = (home / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-compile", AIDER)
    if subprocess.run(install, check=False).returncode:
        pytest.skip("pip cannot install aider here")
    return home / "bin" / "aider"


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """Runs a program in an empty folder; what it says."""

    def run(*command: str | Path, code: int = 0, **env: str) -> str:
        kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
        nowhere = "http://127.0.0.1:9"
        proxies = {"HTTP_PROXY": nowhere, "HTTPS_PROXY": nowhere, "NO_PROXY": "127.0.0.1"}
        work = tmp_path / "work"
        work.mkdir(exist_ok=True)
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            cwd=work,
            env={**kept, **proxies, "HOME": str(tmp_path), **env},
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.mark.parametrize("key", ["ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_API_KEY"])
def test_claude_code(url: str, bin: Path, run: Any, key: str) -> None:
    env = {
        key: "sekrit",
        "ANTHROPIC_BASE_URL": url,
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_AUTOUPDATER": "1",
    }
    # npm may be told to run no scripts, which would put the program in place.
    (program,) = [
        path for path in (bin / "@anthropic-ai").glob("claude-code-*/claude") if path.is_file()
    ]
    allowed = ("--allowedTools", "Bash(echo:*)")
    said = run(program, "-p", "What does echo say?", *allowed, **env)
    assert said.strip() == "It said: forty-two"
    wrong = run(program, "-p", "Hi", code=1, **env | {key: "wrong"})
    assert "401" in wrong, "it does not try for ever"
    again = run(program, "--continue", "-p", "Again?", *allowed, **env)
    assert again.strip() == "It said: forty-two"


def test_codex(url: str, bin: Path, run: Any, tmp_path: Path) -> None:
    folder = tmp_path / ".codex"
    folder.mkdir()
    (folder / "config.toml").write_text(CODEX.format(url=url))
    flags = ("--skip-git-repo-check", "--sandbox", "danger-full-access")
    program = bin / ".bin" / "codex"
    said = run(program, "exec", *flags, "What does echo say?", AGENT_KEY="sekrit")
    assert said.startswith("It said: ") and said.strip().endswith("forty-two")


def test_continue(url: str, bin: Path, run: Any, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(CONTINUE.format(url=url))
    program = bin / ".bin" / "cn"
    said = run(program, "-p", "What does echo say?", "--config", config, "--auto")
    assert said.strip() == "It said: forty-two"


@pytest.mark.parametrize(
    ("model", "env"),
    [
        ("openai/coder", {"OPENAI_API_BASE": "{url}/v1", "OPENAI_API_KEY": "sekrit"}),
        ("anthropic/coder", {"ANTHROPIC_API_BASE": "{url}", "ANTHROPIC_API_KEY": "sekrit"}),
        ("ollama_chat/coder", {"OLLAMA_API_BASE": "{url}", "OLLAMA_API_KEY": "sekrit"}),
    ],
)
def test_aider(
    url: str, aider: Path, run: Any, tmp_path: Path, model: str, env: dict[str, str]
) -> None:
    quiet = ("--no-git", "--yes-always", "--no-check-update", "--no-show-model-warnings")
    flags = ("--model", model, "--edit-format", "whole", "--analytics-disable", *quiet)
    given = {name: value.format(url=url) for name, value in env.items()}
    said = run(aider, *flags, "--message", "Write answer.py", **given)
    assert "Applied edit to answer.py" in said
    assert (tmp_path / "work" / "answer.py").read_text() == 'print("forty-two")\n'
