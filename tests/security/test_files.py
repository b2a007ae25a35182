"""What a client names is not looked for on the disk; what a model brings is data, never code."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_serving import Engine
from mlx_serving.catalog.ensure import ensure
from mlx_serving.config import Config
from mlx_serving.config_sources import override
from mlx_serving.errors import ConfigError, MLXServingError, ModelBroken

PATHS = (
    "/etc/passwd",
    "../../../../etc/passwd",
    "..",
    ".",
    "~",
    "~/.ssh/id_rsa",
    "file:///etc/passwd",
    "https://example.org/model",
    "//example.org/model",
    "C:\\Windows",
    "mlx-community/Qwen3-0.6B-4bit",
    "scripted/../scripted",
    "scripted\0",
    "scripted/",
    "*",
    "",
)


@pytest.mark.parametrize("name", PATHS)
def test_a_client_s_model_is_one_of_those_that_are_served(server: Any, name: str) -> None:
    with server.client() as client:
        for route, body in (
            ("/v1/completions", {"prompt": "x"}),
            ("/v1/messages", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}),
            ("/tokenize", {"prompt": "x"}),
            ("/api/show", {}),
        ):
            answer = client.post(route, json=body | {"model": name})
            assert answer.status_code in (400, 404), (route, answer.text)
        assert "root:" not in answer.text


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/v1/models/..%2f..%2fetc%2fpasswd",
        "/v1/models/%00",
        "/v1/responses/../../etc/passwd",
        "/v1/requests/../cancel",
        "/docs/../../etc/passwd",
        "//etc/passwd",
        "/static/../../etc/passwd",
    ],
)
def test_no_path_leads_to_a_file(server: Any, path: str) -> None:
    with server.client() as client:
        answer = client.build_request("GET", server.url + "/x")
        answer.url = answer.url.copy_with(raw_path=path.encode())
        said = client.send(answer)
    assert said.status_code in (404, 405)
    assert "root:" not in said.text


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.bin", "model.safetensors"])
def test_pickled_weights_are_refused_unread(
    scripted: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    folder, trace = scripted(text="x"), tmp_path / "was-here"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    (folder / name).write_bytes(pickle.dumps(Touch(trace)))
    with pytest.raises(ModelBroken) as refused:
        ensure(str(folder), Config(home=str(tmp_path / "home")))
    assert name in refused.value.message or "safetensors" in refused.value.message
    assert not trace.exists()


async def test_a_model_s_own_code_is_not_run(scripted: Callable[..., Path], tmp_path: Path) -> None:
    folder, trace = scripted(text="x"), tmp_path / "was-here"
    code = f"from pathlib import Path\nPath({str(trace)!r}).touch()\n"
    for name in ("model.py", "tokenization_own.py", "configuration_own.py"):
        (folder / name).write_text(code)
    config = json.loads((folder / "config.json").read_text())
    own = {"auto_map": {"AutoModelForCausalLM": "model.Model"}, "model_file": "model.py"}
    (folder / "config.json").write_text(json.dumps(config | own))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["tokenization_own.Own", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    try:
        async with Engine(str(folder)) as engine:
            await engine.complete("x", max_tokens=1)
    except MLXServingError as error:
        assert "model.py" in str(error)
    assert not trace.exists()


def test_nobody_may_ask_for_remote_code() -> None:
    with pytest.raises(ConfigError):
        override(Config(), {"trust_remote_code": True})


def test_nothing_that_serves_can_unpickle() -> None:
    """Neither `pickle` nor torch is there in a gateway."""
    serving = "import mlx_serving.cli.serve, mlx_serving.api.server, mlx_serving.engine, sys"
    code = f"{serving}; print([m for m in ('torch', 'dill', 'cloudpickle') if m in sys.modules])"
    job = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert job.stdout.strip() == "[]"
    source = Path(sys.modules["mlx_serving"].__file__ or "").parent
    users = [
        str(path)
        for path in source.rglob("*.py")
        if any(
            word in path.read_text()
            for word in ("import pickle", "pickle.load", "torch.load", "marshal.load")
        )
    ]
    assert users == []
