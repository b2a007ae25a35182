"""The tree's own rules, where no linter knows them."""

from __future__ import annotations

import ast
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import typer

from mlx_serving.cli.app import app

ROOT = Path(__file__).parents[1]
MAX_LINES = 600
"""Hard; 500 is the aim."""


def _files() -> list[Path]:
    """What is or would be committed."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):  # an unpacked archive has no git
        hidden = {".git", ".venv", "build", "dist", "__pycache__"}
        found = (p for p in ROOT.rglob("*") if not hidden & set(p.relative_to(ROOT).parts))
        return sorted(p for p in found if p.is_file())
    paths = (ROOT / name for name in names.decode().split("\0") if name)
    return sorted(p for p in paths if p.is_file())


FILES = _files()
TEXT_SUFFIXES = {".py", ".md", ".toml", ".yml", ".yaml", ".cpp", ".h", ".txt", ".sh", ""}
TEXTS = {p: p.read_text(encoding="utf-8") for p in FILES if p.suffix in TEXT_SUFFIXES}
PYTHON = {p: text for p, text in TEXTS.items() if p.suffix == ".py"}
LIBRARY = {p: text for p, text in PYTHON.items() if ROOT / "src" in p.parents}
TESTS = {p: text for p, text in PYTHON.items() if p.name.startswith("test_")}
# Test data may need anything, and this file's patterns match themselves.
OURS = {p: text for p, text in TEXTS.items() if ROOT / "tests" not in p.parents}
OTHERS = {p: text for p, text in PYTHON.items() if p != Path(__file__)}
DOCS = {p: text for p, text in TEXTS.items() if p.suffix == ".md"}


def where(path: Path, text: str, at: int) -> str:
    return f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, at) + 1}"


def offences(texts: dict[Path, str], pattern: str, flags: int = 0) -> list[str]:
    """`file:line: match` of every match."""
    return [
        f"{where(path, text, match.start())}: {match.group()}"
        for path, text in texts.items()
        for match in re.finditer(pattern, text, flags)
    ]


def test_there_is_something_to_check() -> None:
    assert len(LIBRARY) > 10 and TESTS and DOCS


def test_modules_are_short() -> None:
    lengths = {str(p.relative_to(ROOT)): t.count("\n") for p, t in PYTHON.items()}
    assert {name: n for name, n in lengths.items() if n > MAX_LINES} == {}


def test_no_emoji() -> None:
    assert offences(OURS, "[\U0001f000-\U0001faff\u2600-\u26ff\u2705\u274c\u2728\ufe0f]") == []


def test_no_paths_of_a_developers_machine() -> None:
    """Made-up home folders are fine as test data."""
    start, end = r"(?<![\w.$}])/(?:", r")/[\w.-]+"
    allowed = re.compile(r"/(?:Users|home)/(?:you|user|me|app)\b|/opt/homebrew")
    found = offences(TEXTS, f"{start}root|opt|work{end}") + offences(
        OURS, f"{start}Users|home{end}"
    )
    assert [o for o in found if not allowed.search(o)] == []


def test_what_is_left_to_do_names_its_issue() -> None:
    marks = "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK"))
    assert offences(TEXTS, rf"\b(?:{marks})\b(?!\(#\d+\))") == []


def test_no_suppression_without_a_code() -> None:
    assert offences(OTHERS, r"# type: ignore(?!\[)|# noqa(?!:)", re.MULTILINE) == []


def test_no_skipped_test_without_a_reason() -> None:
    assert offences(TESTS, r"@pytest\.mark\.(?:skip|xfail)\s*(?:\(\s*\)|\n)") == []


def test_tests_do_not_sleep() -> None:
    """A long sleep in a test is a bet on the machine's speed; waiting for a condition is not."""
    sleeps = [
        f"{path.name}:{node.lineno}: {ast.unparse(node)}"
        for path, text in TESTS.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("time.sleep", "sleep")
        and isinstance(node.args[0], ast.Constant)
        and float(str(node.args[0].value)) >= 0.5
    ]
    assert sleeps == []


def test_every_package_is_one() -> None:
    folders = {p.parent for p in LIBRARY}
    assert [f for f in sorted(folders) if f / "__init__.py" not in LIBRARY] == []


def test_every_module_says_what_it_is() -> None:
    mute = [
        str(path.relative_to(ROOT))
        for path, text in LIBRARY.items()
        if not ast.get_docstring(ast.parse(text))
    ]
    assert mute == []


def test_test_modules_have_names_of_their_own() -> None:
    names = Counter(path.name for path in TESTS)
    assert [name for name, count in names.items() if count > 1] == []


def test_no_test_hides_another() -> None:
    """Two functions of one name in a module: only the second would run."""
    hidden = []
    for path, text in TESTS.items():
        scopes: list[ast.Module | ast.ClassDef] = [ast.parse(text)]
        scopes += [node for node in scopes[0].body if isinstance(node, ast.ClassDef)]
        for scope in scopes:
            names = Counter(
                node.name
                for node in scope.body
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            )
            hidden += [f"{path.name}: {name}" for name, n in names.items() if n > 1]
    assert hidden == []


@pytest.mark.parametrize("doc", sorted(DOCS), ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(doc: Path) -> None:
    text = re.sub(r"```.*?```", "", DOCS[doc], flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    local = [t.split("#")[0] for t in targets if not re.match(r"[a-z]+:|#", t)]
    assert [t for t in local if not (doc.parent / t).exists()] == []


def test_doors_that_the_docs_name_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    prose = "\n".join(DOCS.values()) + (ROOT / ".ci" / "run").read_text()
    named = set(re.findall(r"(?:`|^\s*(?:\$ |- run: )?)make ([a-z][\w-]*)", prose, re.MULTILINE))
    assert {"check", "test"} <= named
    assert named - targets == set()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony is not None and set(phony.group(1).split()) == targets


def test_commands_that_the_docs_name_exist() -> None:
    commands = set(typer.main.get_group(app).commands)
    # A transcript also has what the command prints of itself.
    prose = "\n".join(DOCS.values()).replace("mlx-serving is listening", "")
    named = set(re.findall(r"(?:`|^\s*\$? ?)mlx-serving ([a-z]+)", prose, re.M))
    assert named - commands == set()


def test_settings_that_the_docs_name_exist() -> None:
    from mlx_serving.config import FIELDS, env_name

    known = {env_name(name) for name in FIELDS} | {
        "MLX_SERVING_CONFIG",
        "MLX_SERVING_AMX",
        "MLX_SERVING_REQUIRE_NATIVE",
    }
    named = set(re.findall(r"\bMLX_SERVING_[A-Z_]*[A-Z]\b(?!_?\*)", "\n".join(DOCS.values())))
    assert {n for n in named - known if not n.startswith("MLX_SERVING_TEST_")} == set()


def test_the_version_is_written_once_more_at_most() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    from mlx_serving import __version__

    assert project.get("version", __version__) == __version__
