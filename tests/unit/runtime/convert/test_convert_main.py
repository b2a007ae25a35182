"""The job's command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_serving.runtime.convert.main import main
from mlx_serving.worker import jobwire


def test_failures_are_events_on_stdout_and_status_1(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    (tmp_path / "x.gguf").write_bytes(b"nothing of the kind, at all")
    assert main(["--json-progress", "gguf", str(tmp_path / "x.gguf"), str(tmp_path / "o")]) == 1
    event = jobwire.decode(capfdbinary.readouterr().out)
    assert isinstance(event, jobwire.Failed)
    assert event.code == "corrupt_file"


def test_without_json_the_reason_goes_to_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["gguf", str(tmp_path / "gone.gguf"), str(tmp_path / "o")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "io_error" in captured.err
    assert "gone.gguf" in captured.err


@pytest.mark.parametrize("value", ["4", "4,x", "7,64", "4,48"])
def test_a_wrong_quantisation_is_refused(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["gguf", "--quantize", value, "a", "b"])
    assert caught.value.code == 2
    assert "BITS" in capsys.readouterr().err
