"""The server's certificate."""

from __future__ import annotations

import ssl

from mlx_serving.config import Config
from mlx_serving.errors import ConfigError


def context(config: Config) -> ssl.SSLContext | None:
    """TLS 1.2 and later with the configured certificate; None without one. Raises ConfigError."""
    if config.tls_cert is None:
        return None
    made = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    made.set_alpn_protocols(["http/1.1"])

    def no_password() -> str:
        raise ConfigError("The TLS key has a pass phrase; give one without.", param="tls_key")

    try:
        made.load_cert_chain(config.tls_cert, config.tls_key, password=no_password)
    except ssl.SSLError as error:
        reason = error.reason or "not a certificate and its key in PEM"
        raise ConfigError(f"The TLS certificate: {reason}.", param="tls_cert") from None
    except OSError as error:
        raise ConfigError(f"The TLS certificate: {error.strerror}.", param="tls_cert") from None
    return made
