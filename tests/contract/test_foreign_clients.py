"""Clients whose dependencies are not ours, in an environment that the test makes: instructor and
LiteLLM; and `llm`, which takes seconds to import. Scripted models, and SmolLM2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from contract.served import serving

pytestmark = [pytest.mark.slow, pytest.mark.model]

PINNED = ("instructor==1.17.0", "litellm==1.83.0", "openai==3.3.0")
"""Releases that go together: unpinned, the installer tries many."""
WORDS = "Grüße, 🤔 Welt!"
AGENT = (
    "<think>Hm.</think>Let me add.\n"
    '<tool_call>\n{"name": "add", "arguments": {"x": 1, "y": 2}}\n</tool_call>'
)
TOOLS = (
    "{{ tools }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{# <tool_call> #}"
)
MODELS_YAML = """
- model_id: our-{name}
  model_name: {name}
  api_base: "{url}/v1"
  supports_tools: true
  supports_schema: true
"""


@pytest.fixture(scope="module")
def url(scripted_once: Any, model_dir: Path) -> Iterator[str]:
    models = [
        scripted_once("plain", text=WORDS, context=4096),
        scripted_once("agent", text=AGENT, context=4096, chat_template=TOOLS + "{# <think> </think> #}"),
        scripted_once("hash", mode="hash", context=4096, chat_template=TOOLS),
        model_dir,
    ]  # fmt: skip
    with serving(models, "--model-aliases", "claude-*=agent") as url:
        yield url


@pytest.fixture(scope="module")
def told(url: str, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What foreign_clients.py printed."""
    home = tmp_path_factory.mktemp("clients")
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", *PINNED]
    subprocess.run(install, check=True)
    script = Path(__file__).with_name("foreign_clients.py")
    done = subprocess.run(
        [python, script, url, model_dir.name],
        capture_output=True,
        text=True,
        env=os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"},
    )
    assert done.returncode == 0, done.stderr
    answers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answers


@pytest.mark.parametrize("model", ["pets", "real pets"])
@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_instructor(told: dict[str, Any], model: str, mode: str) -> None:
    for pet in told[model][mode]:
        assert pet["kind"] in ("cat", "dog") and len(pet["name"]) <= 6 and 0 <= pet["age"] <= 130


@pytest.mark.parametrize("how", ["whole", "streamed"])
def test_litellm(told: dict[str, Any], how: str) -> None:
    for prefix in ("openai/", "anthropic/", "ollama_chat/", "ollama/"):
        plain = told[f"{prefix} {how}"]
        assert (plain["content"], plain["finish_reason"]) == (WORDS, "stop"), prefix
        assert told[f"{prefix} {how} cut"]["content"] == WORDS[:5], prefix
    for prefix in ("openai/", "anthropic/", "ollama_chat/"):
        agent = told[f"{prefix} {how} tools"]
        assert agent["calls"] == [["add", {"x": 1, "y": 2}]], prefix
        assert (agent["reasoning"], agent["content"].strip()) == ("Hm.", "Let me add."), prefix
        # ollama/ has a prompt of its own making.
        assert told[f"{prefix} {how} real"] == told[f"openai/ {how} real"], prefix
    assert told[f"openai/ {how} tools"]["finish_reason"] == "tool_calls"
    assert told[f"anthropic/ {how} tools"]["finish_reason"] == "tool_calls"


LLM_SCRIPT = """
import json
import llm

def add(x: int, y: int) -> int:
    "Adds two numbers."
    called.append([x, y])
    return x + y

called, told = [], {}
kind = {"type": "object", "properties": {"kind": {"enum": ["cat", "dog"]}},
        "required": ["kind"], "additionalProperties": False}
for stream in (True, False):
    plain = llm.get_model("our-plain").prompt("Hi", stream=stream, temperature=0, seed=3)
    pet = llm.get_model("our-hash").prompt("Hi", stream=stream, schema=kind, max_tokens=60)
    chain = llm.get_model("our-agent").conversation(tools=[add]).chain("1 + 2?", stream=stream, chain_limit=2)
    try:
        chain.text()
    except ValueError:
        pass  # the agent would go on for ever
    told[str(stream)] = [plain.text(), pet.text(), list(called)]
    called.clear()
print(json.dumps(told))
"""


def test_llm(url: str, tmp_path: Path) -> None:
    names = ("plain", "hash", "agent")
    yaml = "".join(MODELS_YAML.format(name=name, url=url) for name in names)
    (tmp_path / "extra-openai-models.yaml").write_text(yaml)
    env = os.environ | {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "x"}
    done = subprocess.run(
        [sys.executable, "-c", LLM_SCRIPT], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    for text, pet, calls in json.loads(done.stdout.splitlines()[-1]).values():
        assert text == WORDS
        assert json.loads(pet)["kind"] in ("cat", "dog")
        assert [1, 2] in calls
