"""What people and programs are told."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from mlx_serving.cli.say import REPEAT_S, BarProgress, LineProgress, Say, size
from mlx_serving.errors import ConfigError
from mlx_serving.host import Finding
from mlx_serving.types import ModelInfo

INFO = ModelInfo(
    model_id="smollm2-135m",
    path="/m",
    architecture="llama",
    context_length=8192,
    vocab_size=49152,
    eos_token_ids=(2,),
    quantization="4-bit",
    weight_bytes=84_000_000,
    load_s=1.25,
)


def spoken(as_json: bool = False) -> tuple[Say, io.StringIO, io.StringIO]:
    out, err = io.StringIO(), io.StringIO()
    return Say(as_json, out, err), out, err


def test_what_to_try_over_tcp() -> None:
    say, out, err = spoken()
    say.listening("http://127.0.0.1:8000", "smollm2-135m")
    text = err.getvalue()
    assert out.getvalue() == ""
    assert "curl http://127.0.0.1:8000/v1/chat/completions" in text
    assert 'OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")' in text
    assert "http://127.0.0.1:8000/health" in text
    assert "http://127.0.0.1:8000/metrics" in text
    body = text.split("-d '")[1].split("'")[0]
    assert json.loads(body)["model"] == "smollm2-135m"


def test_what_to_try_over_a_unix_socket() -> None:
    say, _, err = spoken()
    say.listening("unix:/run/x.sock", "m")
    assert "curl --unix-socket /run/x.sock http://localhost/v1/chat/completions" in err.getvalue()
    assert 'httpx.HTTPTransport(uds="/run/x.sock")' in err.getvalue()


def test_a_program_gets_one_object_a_line() -> None:
    say, out, err = spoken(as_json=True)
    say.listening("unix:/run/x.sock", "m")
    say.loaded(INFO)
    say.unable(
        [
            Finding(code="python", level="ok", message="fine"),
            Finding(code="no_avx2", level="fail", message="no AVX2", remedy="another CPU"),
        ]
    )
    first, second, third = map(json.loads, out.getvalue().splitlines())
    assert (first["event"], first["uds"]) == ("listening", "/run/x.sock")
    assert (second["event"], second["model"], second["weight_bytes"]) == (
        "model_loaded",
        "smollm2-135m",
        84_000_000,
    )
    assert third == {
        "event": "error",
        "code": "no_avx2",
        "message": "no AVX2",
        "remedy": "another CPU",
    }
    assert err.getvalue() == ""


def test_a_loaded_model_is_named_with_size_and_time() -> None:
    say, _, err = spoken()
    say.loaded(INFO)
    assert err.getvalue() == (
        "smollm2-135m is ready: 84.0 MB of weights (4-bit), kernels mlx, loaded in 1.2 s\n"
    )


def test_each_mistake_is_a_line_and_a_busy_port_has_a_remedy() -> None:
    say, _, err = spoken()
    say.config_error(ConfigError("--port: a\n--host: b"))
    say.config_error(ConfigError("Cannot listen.", code="address_unavailable"))
    lines = err.getvalue().splitlines()
    assert lines[:3] == ["error: --port: a", "error: --host: b", "error: Cannot listen."]
    assert "--port" in lines[3]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (144_500_000, "144.5 MB"), (2e12, "2.0 TB")],
)
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


def test_a_download_without_a_terminal_is_told_now_and_then() -> None:
    say, _, err = spoken()
    now = [0.0]
    progress = LineProgress(say, clock=lambda: now[0])
    progress.start("model.safetensors", 1000)
    progress.advance(100)
    now[0] = REPEAT_S
    progress.advance(100)
    progress.advance(100)
    progress.finish()
    assert err.getvalue().splitlines() == [
        "model.safetensors: 0 B of 1.0 kB",
        "model.safetensors: 200 B of 1.0 kB",
        "model.safetensors: 1.0 kB of 1.0 kB",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar() -> None:
    err = Terminal()
    progress: Any = Say(err=err).progress()
    assert isinstance(progress, BarProgress)
    progress.advance(1)
    progress.start("model.safetensors", 1000)
    progress.advance(1000)
    progress.finish()
    assert "model.safetensors" in err.getvalue()
    assert isinstance(Say(as_json=True, err=err).progress(), LineProgress)
