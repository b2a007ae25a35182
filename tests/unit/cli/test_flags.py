"""The flags are the settings: same names, help for each, and both parsers agree."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from mlx_serving.cli import flags
from mlx_serving.cli import serve as serve_command
from mlx_serving.cli.app import app
from mlx_serving.cli.flags import GROUPS, ServeArgs, field_docs, parse_plain
from mlx_serving.config import FIELDS, flag_name, is_bool


def through_typer(argv: list[str]) -> ServeArgs:
    """What `serve` would run with, had typer parsed it."""
    import typer

    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    context = command.make_context("serve", list(argv))
    values = dict(context.params)
    config, json = values.pop("config"), values.pop("json")
    return flags.from_typer(values, str(config) if config else None, json)


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["a"],
        ["a", "--port", "1", "b"],
        ["--port=1", "--port", "2"],
        ["--served-model-name", "x", "--served-model-name=y", "a", "b"],
        ["--offline", "--no-supervise"],
        ["--offline", "--no-offline"],
        ["--config", "f.yaml", "--json"],
        ["--config=f.yaml"],
        ["--host="],
    ],
)
def test_the_plain_parser_agrees_with_typer(argv: list[str]) -> None:
    assert parse_plain(argv) == through_typer(argv)


WORDS = st.text("abc019/._", min_size=1, max_size=5)


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    argv: list[str] = []
    for name in draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=5)):
        value = draw(WORDS)
        if name == flags.POSITIONAL:
            argv += [value]
        elif is_bool(name):
            argv += [draw(st.sampled_from([flag_name(name), flag_name("no_" + name)]))]
        else:
            argv += draw(
                st.sampled_from([[flag_name(name), value], [f"{flag_name(name)}={value}"]])
            )
    return argv


@settings(deadline=None)
@given(command_lines())
def test_the_plain_parser_agrees_with_typer_on_any_line(argv: list[str]) -> None:
    assert parse_plain(argv) == through_typer(argv)


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["-h"],
        ["--prot", "1"],
        ["--port"],
        ["--port", "--json"],
        ["--offline=1"],
        ["--no-port"],
        ["--json=1"],
        ["--"],
    ],
)
def test_everything_else_is_left_to_typer(argv: list[str]) -> None:
    assert parse_plain(argv) is None


def test_every_setting_has_help_and_a_flag() -> None:
    docs = field_docs()
    assert set(docs) == set(FIELDS)
    result = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 0
    for name in set(FIELDS) - {flags.POSITIONAL}:
        assert flag_name(name) in result.stdout
    assert "smollm2-135m" in result.stdout
    for group in {*GROUPS.values(), "Sources", "Arguments"}:
        assert group in result.stdout


def test_groups_begin_at_fields_that_exist() -> None:
    assert set(GROUPS) <= set(FIELDS)
    assert next(iter(GROUPS)) == next(iter(FIELDS))


def test_a_misspelt_flag_gets_a_suggestion() -> None:
    result = CliRunner().invoke(app, ["serve", "--prot", "1"])
    assert result.exit_code == 2
    assert "--port" in result.stderr


def test_serve_is_parsed_without_typer() -> None:
    code = (
        "import sys; from mlx_serving.cli import main\n"
        "try: main(['serve', '--port', 'abc'])\n"
        "except SystemExit as e: print(e.code, 'typer' in sys.modules, 'rich' in sys.modules)"
    )
    job = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert job.stdout.split() == ["2", "False", "False"]
    assert "--port: expected int, got 'abc'" in job.stderr


def test_typer_hands_the_same_arguments_over() -> None:
    """A line that only typer parses, run for real as far as its first mistake."""
    result = CliRunner().invoke(app, ["serve", "--json", "--port", "-1"])
    assert result.exit_code == 2
    assert '"--port: must be >= 0, got -1"' in result.stdout
    assert serve_command.run(ServeArgs(settings={"port": "-1"})) == 2
