"""Sources, precedence, ranges, and the words of each mistake."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from mlx_serving import config
from mlx_serving.config import FIELDS, Config
from mlx_serving.config_sources import load, override
from mlx_serving.errors import ConfigError


def mistakes(*args: object, **kwargs: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(*args, **{"env": {}, **kwargs})  # type: ignore[arg-type]
    return caught.value.message.splitlines()


def test_defaults_are_within_their_own_ranges() -> None:
    assert msgspec.convert(msgspec.to_builtins(Config()), Config) == Config() == load(env={})


def test_flag_wins_over_variable_over_file_over_default(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("port: 1\nmax_queue: 1\nmax_num_seqs: 1\n")
    env = {
        "MLX_SERVING_CONFIG": str(file),
        "MLX_SERVING_PORT": "2",
        "MLX_SERVING_MAX_QUEUE": "2",
        "PATH": "/bin",
    }
    got = load({"port": "3"}, env=env)
    assert (got.port, got.max_queue, got.max_num_seqs, got.log_level) == (3, 2, 1, "info")


def test_config_flag_wins_over_config_variable(tmp_path: Path) -> None:
    for name, port in (("a.yaml", 1), ("b.yaml", 2)):
        (tmp_path / name).write_text(f"port: {port}\n")
    env = {"MLX_SERVING_CONFIG": str(tmp_path / "a.yaml")}
    assert load(env=env, file=str(tmp_path / "b.yaml")).port == 2


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("port", "0", 0),
        ("drain_timeout_s", "1", 1.0),
        ("drain_timeout_s", "1.5", 1.5),
        ("supervise", "0", False),
        ("supervise", "off", False),
        ("supervise", "TRUE", True),
        ("supervise", "Yes", True),
        ("uds", "/run/x.sock", "/run/x.sock"),
        ("uds", "none", None),
        ("context_length", "None", None),
        ("context_length", "4096", 4096),
        ("host", "none", "none"),
        ("kernels", "off", "off"),
        ("models", "a", ("a",)),
        ("models", ["a", "b"], ("a", "b")),
    ],
)
def test_text_becomes_a_value(name: str, text: str | list[str], value: object) -> None:
    got = getattr(load({name: text}, env={}), name)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("port", "abc", "--port: expected int, got 'abc'"),
        ("port", "1.5", "--port: expected int, got '1.5'"),
        ("port", "70000", "--port: must be <= 65535, got 70000"),
        ("port", "-1", "--port: must be >= 0, got -1"),
        ("port", "", "--port: expected int, got ''"),
        ("port", ["1", "2"], "--port: expected int, got a list"),
        ("max_num_seqs", "0", "--max-num-seqs: must be >= 1, got 0"),
        ("context_length", "0", "--context-length: must be >= 1, got 0"),
        ("load_timeout_s", "0", "--load-timeout-s: must be > 0, got 0"),
        ("load_timeout_s", "inf", "--load-timeout-s: must be finite, got inf"),
        ("drain_timeout_s", "nan", "--drain-timeout-s: must be >= 0, got nan"),
        ("supervise", "maybe", "--supervise: expected true or false, got 'maybe'"),
        (
            "log_level",
            "loud",
            "--log-level: expected one of debug, info, warning, error, got 'loud'",
        ),
        ("host", "", "--host: must not be empty"),
        ("models", [], "--models: must not be empty"),
        ("models", ["a", ""], "--models: an item is empty"),
        ("models", ["a", "a"], "--models: a model is given twice"),
        ("served_model_name", ["a", "b"], "--served-model-name: 2 names for 1 model(s)"),
    ],
)
def test_a_wrong_flag_is_named(name: str, text: str | list[str], reason: str) -> None:
    assert mistakes({name: text}) == [reason]


@pytest.mark.parametrize(
    ("variable", "reason"),
    [
        (("MLX_SERVING_PORT", "abc"), "MLX_SERVING_PORT: expected int, got 'abc'"),
        (
            ("MLX_SERVING_PROT", "1"),
            "MLX_SERVING_PROT: unknown variable (did you mean 'MLX_SERVING_PORT'?)",
        ),
        (("MLX_SERVING_XYZZY", "1"), "MLX_SERVING_XYZZY: unknown variable"),
        (("MLX_SERVING_MODELS", "a,,b"), "MLX_SERVING_MODELS: an item is empty"),
    ],
)
def test_a_wrong_variable_is_named(variable: tuple[str, str], reason: str) -> None:
    assert mistakes(env=dict([variable])) == [reason]


def test_variables_that_are_not_settings() -> None:
    env = {
        "MLX_SERVING_TEST_MODEL_DIR": "x",
        "MLX_SERVING_REQUIRE_NATIVE": "1",
        "MLX_SERVING_AMX": "0",
        "MLX_SERVING_PORT": "",
        "MLX_SERVING_HOME": "h",
        "MLX_SERVING_MODELS": "a, b",
    }
    got = load(env=env)
    assert (got.port, got.home, got.models) == (8000, "h", ("a", "b"))


YAML_MISTAKES = """\
# line 1
models: [a, b]
prot: 3
port: "abc"
port: 4
max_num_seqs: 0
uds: {a: b}
context_length: null
host: null
[1]: 2
served_model_name: [[x]]
"""


def test_each_mistake_in_a_file_has_its_line(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(YAML_MISTAKES)
    with pytest.raises(ConfigError) as caught:
        load(env={}, file=str(file))
    lines = caught.value.message.replace(f"{tmp_path}/", "").splitlines()
    assert lines == [
        "serve.yaml:3: unknown key 'prot' (did you mean 'port'?)",
        "serve.yaml:5: key 'port' is already on line 4",
        "serve.yaml:7: uds: expected a plain value or a list of them",
        "serve.yaml:10: unknown key '?'",
        "serve.yaml:11: served_model_name: expected a plain value or a list of them",
        "serve.yaml:4: port: expected int, got 'abc'",
        "serve.yaml:6: max_num_seqs: must be >= 1, got 0",
        "serve.yaml:9: host: expected text, got null",
    ]
    assert caught.value.param == f"{file}:3"


def test_scalars_mean_what_they_say(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("kernels: off\nsupervise: off\nmodels: a\nuds: ~\nport: '9'\n")
    got = load(env={}, file=str(file))
    assert (got.kernels, got.supervise, got.models, got.uds, got.port) == (
        "off",
        False,
        ("a",),
        None,
        9,
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"a: [1\n", "serve.yaml:2: expected ',' or ']', but got '<stream end>'"),
        (b"- a\n", "serve.yaml:1: expected 'key: value' lines"),
        (b"\xff\xfe\xfa", "serve.yaml: not UTF-8 text"),
        (b"a\x00: 1", "unacceptable character"),
    ],
)
def test_a_file_that_is_no_mapping(tmp_path: Path, content: bytes, reason: str) -> None:
    file = tmp_path / "serve.yaml"
    file.write_bytes(content)
    assert reason in mistakes(file=str(file))[0].replace(f"{tmp_path}/", "")


def test_a_file_that_is_missing_or_empty(tmp_path: Path) -> None:
    assert mistakes(file=str(tmp_path / "no.yaml")) == [
        f"{tmp_path}/no.yaml: No such file or directory"
    ]
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load(env={}, file=str(tmp_path / "empty.yaml")) == Config()


@pytest.mark.parametrize(
    ("url", "form", "reason"),
    [
        ("hooks.example.org/x", "json", "is no URL"),
        ("https://", "json", "is no URL"),
        ("#key", "pagerduty", "is no URL"),
        ("https://events.example.org/v2", "pagerduty", "routing key is missing"),
    ],
)
def test_a_webhook_that_cannot_be_told(url: str, form: str, reason: str) -> None:
    (said,) = mistakes(flags={"alert_webhook": url, "alert_format": form})
    assert said.startswith("--alert-webhook: ") and reason in said and "example.org/x" not in said


@pytest.mark.parametrize(
    ("url", "form"), [("http://127.0.0.1:9/x?y=z", "slack"), ("https://e.example#k", "pagerduty")]
)
def test_webhooks(url: str, form: str) -> None:
    assert load({"alert_webhook": url, "alert_format": form}, env={}).alert_webhook == url


def test_override_checks_typed_values() -> None:
    assert override(Config(), {"models": ("a",), "port": 0}).models == ("a",)
    with pytest.raises(ConfigError) as caught:
        override(Config(), {"max_num_seq": 3, "port": -1, "host": 5})
    assert caught.value.message.splitlines() == [
        "unknown setting 'max_num_seq' (did you mean 'max_num_seqs'?)",
        "port: must be >= 0, got -1",
        "host: expected text, got 5",
    ]


def test_every_setting_can_be_described() -> None:
    words = {name: config.describe(name) for name in FIELDS}
    assert words["port"] == "int"
    assert words["load_timeout_s"] == "float"
    assert words["models"] == "a list of texts"
    assert words["dtype"] == "one of auto, float32, float16, bfloat16"
    assert words["supervise"] == "true or false"
    assert words["uds"] == "text"
