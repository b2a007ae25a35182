"""A running server's admin routes, for commands."""

from __future__ import annotations

import os
from typing import Any

from mlx_serving.cli.say import Say


class Server:
    """A running server's admin API.

    Args:
        url, uds: where it is; `uds` wins.
        admin_key: default `MLX_SERVING_ADMIN_KEY`; none is needed on its own machine where it has none.
    """

    def __init__(self, url: str, uds: str | None, admin_key: str | None, say: Say) -> None:
        self._base = "http://localhost" if uds else url.rstrip("/")
        self._uds = uds
        self._key = admin_key or os.environ.get("MLX_SERVING_ADMIN_KEY")
        self.where = uds or url
        self.say = say

    def call(self, method: str, path: str, body: object = None) -> Any:
        """The answer's JSON, or None once the error has been said."""
        import httpx

        transport = httpx.HTTPTransport(uds=self._uds) if self._uds else None
        headers = {"authorization": f"Bearer {self._key}"} if self._key else {}
        try:
            with httpx.Client(transport=transport, headers=headers, timeout=30.0) as http:
                answer = http.request(method, f"{self._base}{path}", json=body)
                found = answer.json()
        except (httpx.HTTPError, ValueError) as error:
            self.say.error("no_server", f"no server of ours answers at {self.where}: {error}")
            return None
        if answer.is_error:
            wrong = found.get("error", {})
            place, message = wrong.get("param") or "", wrong.get("message", "")
            if place and not message.startswith(place):
                message = f"{place}: {message}"
            self.say.error(wrong.get("code") or "refused", message)
            return None
        return found
