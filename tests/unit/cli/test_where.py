"""Where the commands look for a server."""

from __future__ import annotations

from typing import Any

import pytest
import typer

from mlx_serving.cli.where import where


@pytest.mark.parametrize(
    ("given", "env", "base", "uds"),
    [
        ({}, {}, "http://127.0.0.1:8000", None),
        ({}, {"MLX_SERVING_PORT": "9000"}, "http://127.0.0.1:9000", None),
        ({}, {"MLX_SERVING_HOST": "0.0.0.0"}, "http://127.0.0.1:8000", None),
        ({}, {"MLX_SERVING_HOST": "::"}, "http://[::1]:8000", None),
        ({}, {"MLX_SERVING_TLS_CERT": "c.pem"}, "https://127.0.0.1:8000", None),
        ({}, {"MLX_SERVING_UDS": "/run/x"}, "http://localhost", "/run/x"),
        ({"url": "localhost:7"}, {"MLX_SERVING_UDS": "/run/x"}, "http://localhost:7", None),
        ({"url": "http://h:1/v1/"}, {"MLX_SERVING_PORT": "9"}, "http://h:1", None),
        ({"url": "http://h:1", "uds": "/run/y"}, {}, "http://localhost", "/run/y"),
    ],
)
def test_flags_come_before_variables(
    given: dict[str, Any], env: dict[str, str], base: str, uds: str | None
) -> None:
    found = where(**given, env=env)
    assert (found.base, found.uds) == (base, uds)


@pytest.mark.parametrize("url", ["http://[::1", "ftp://h", "http://", "http://h:port"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(typer.BadParameter, match=r"is no URL"):
        where(url, env={})
