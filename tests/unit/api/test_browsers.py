from __future__ import annotations

import shutil
import ssl
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from mlx_serving.api.browsers import host_name, policy, refusal
from mlx_serving.config import Config
from mlx_serving.config_sources import load
from mlx_serving.errors import ConfigError

PLAIN = policy(Config())
CHAT = policy(Config(cors_origin=("https://chat.example.org/",), allowed_host=("api.example.org",)))
WIDE = policy(Config(host="0.0.0.0"))
UDS = policy(Config(uds="/run/x"))


@pytest.mark.parametrize(
    ("rules", "host", "origin", "code"),
    [
        (PLAIN, "127.0.0.1:8000", None, None),
        (PLAIN, "localhost", None, None),
        (PLAIN, "LOCALHOST:8000", None, None),
        (PLAIN, "[::1]:8000", None, None),
        (PLAIN, None, None, None),
        (PLAIN, "evil.example:8000", None, "host_not_allowed"),
        (PLAIN, "127.0.0.1.evil.example", None, "host_not_allowed"),
        (PLAIN, "", None, "host_not_allowed"),
        (PLAIN, "localhost:8000", "http://localhost:8000", None),
        (PLAIN, "localhost:8000", "http://localhost:3000", "origin_not_allowed"),
        (PLAIN, "localhost:8000", "https://evil.example", "origin_not_allowed"),
        (PLAIN, "localhost:8000", "null", "origin_not_allowed"),
        (PLAIN, "localhost:8000", "", "origin_not_allowed"),
        (CHAT, "api.example.org", "https://chat.example.org", None),
        (CHAT, "localhost", "https://CHAT.example.org", None),
        (CHAT, "localhost", "https://chat.example.org.evil.example", "origin_not_allowed"),
        (CHAT, "localhost", "http://chat.example.org", "origin_not_allowed"),
        (WIDE, "anything.example", None, None),
        (WIDE, "anything.example", "https://evil.example", "origin_not_allowed"),
        (UDS, "anything.example", None, None),
    ],
)
def test_the_rules(rules: Any, host: str | None, origin: str | None, code: str | None) -> None:
    error = refusal(rules, host, origin)
    assert (error and error.code) == code


def test_host_names() -> None:
    assert [host_name(h) for h in ("A:1", "a", "[::1]:8", "[fe80::1]")] == [
        "a",
        "a",
        "::1",
        "fe80::1",
    ]


@pytest.mark.parametrize("origin", ["*", "example.org", "https://*.example.org", "https://a/b"])
def test_an_origin_is_written_out(origin: str) -> None:
    with pytest.raises(ConfigError, match="no origin"):
        load({"cors_origin": [origin]}, env={})


def test_pages_elsewhere_are_kept_out(start_server: Any, gateway: Any) -> None:
    server = start_server()
    headers = {"origin": "https://evil.example", "content-type": "text/plain"}
    refused = httpx.post(
        server.address + "/v1/completions", content=b'{"prompt": "x"}', headers=headers
    )
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "origin_not_allowed")
    assert "access-control-allow-origin" not in refused.headers
    rebound = httpx.get(server.address + "/health", headers={"host": "evil.example"})
    assert (rebound.status_code, rebound.json()["error"]["code"]) == (403, "host_not_allowed")
    assert gateway.requests == []


def test_a_named_origin_is_let_in(start_server: Any) -> None:
    server = start_server(cors_origin=("https://chat.example.org",))
    origin = {"origin": "https://chat.example.org"}
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "x-api-key"}
    with httpx.Client(base_url=server.address) as client:
        preflight = client.options("/v1/completions", headers=origin | asked)
        assert preflight.status_code == 204
        assert preflight.headers["access-control-allow-headers"] == "x-api-key"
        answer = client.post("/v1/completions", json={"prompt": "x"}, headers=origin)
        for said in (preflight, answer):
            assert said.headers["access-control-allow-origin"] == "https://chat.example.org"
            assert said.headers["vary"] == "origin"
        exposed = answer.headers["access-control-expose-headers"].split(", ")
        ours = {name for name in answer.headers if name.startswith("x-mlx-")}
        assert ours and ours <= set(exposed)
        assert {"x-mlx-serving-ignored", "x-mlx-cache", "x-mlx-variant"} <= set(exposed)
        assert answer.status_code == 200
        assert "access-control-allow-origin" not in client.get("/health").headers
        assert client.get("/health").headers["x-content-type-options"] == "nosniff"
        page = client.get("/docs")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert page.headers["x-frame-options"] == "DENY"


# ------------------------------------------------------------------- TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    cert, key = str(folder / "cert.pem"), str(folder / "key.pem")
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    files = ["-nodes", "-days", "2", "-keyout", key, "-out", cert]
    subprocess.run([*command, *subject, *files], check=True, capture_output=True)
    return cert, key


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1:DeprecationWarning")
def test_https(start_server: Any, certificate: tuple[str, str]) -> None:
    cert, key = certificate
    server = start_server(tls_cert=cert, tls_key=key)
    assert server.address.startswith("https://")
    trusted = ssl.create_default_context(cafile=cert)
    with httpx.Client(base_url=server.address, verify=trusted) as client:
        assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 200
    plain = server.address.replace("https", "http")
    with pytest.raises(httpx.HTTPError):
        httpx.get(plain + "/health")
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(httpx.HTTPError):
        httpx.get(server.address + "/health", verify=old)


def test_a_certificate_that_cannot_be_used(certificate: tuple[str, str], tmp_path: Path) -> None:
    from mlx_serving.api.tls import context

    cert, key = certificate
    junk = tmp_path / "junk.pem"
    junk.write_text("junk")
    assert context(Config()) is None
    for wrong in (
        {"tls_cert": "/none"},
        {"tls_cert": str(junk)},
        {"tls_cert": cert, "tls_key": cert},
    ):
        with pytest.raises(ConfigError) as caught:
            context(Config(**wrong))
        assert caught.value.param == "tls_cert"
    with pytest.raises(ConfigError, match="without a certificate"):
        load({"tls_key": key}, env={})
