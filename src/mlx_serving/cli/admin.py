"""A running server's admin routes, for commands, and the flags that find it."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_serving.cli.where import Uds, Url, Where, where

if TYPE_CHECKING:
    from mlx_serving.cli.say import Say


class Server:
    """A running server's admin API.

    Args:
        admin_key: default `MLX_SERVING_ADMIN_KEY`; none is needed on its own machine where it has none.
    """

    def __init__(self, where: Where, admin_key: str | None, say: Say) -> None:
        self._key = admin_key or os.environ.get("MLX_SERVING_ADMIN_KEY")
        self.where = where
        self.say = say

    def call(self, method: str, path: str, body: object = None) -> Any:
        """The answer's JSON, or None once the error has been said."""
        import httpx

        headers = {"authorization": f"Bearer {self._key}"} if self._key else {}
        try:
            with self.where.client(headers=headers, timeout=30.0) as http:
                answer = http.request(method, path, json=body)
                found = answer.json()
        except (httpx.HTTPError, ValueError) as error:
            self.say.error("no_server", f"no server of ours answers at {self.where}: {error}")
            return None
        if answer.is_error:
            wrong = found.get("error") if isinstance(found, dict) else None
            if not isinstance(wrong, dict):
                self.say.error(
                    "no_server", f"{self.where} answered {answer.status_code}, and not as ours do"
                )
                return None
            place, message = wrong.get("param") or "", wrong.get("message", "")
            if place and not message.startswith(place):
                message = f"{place}: {message}"
            remedy = "give --admin-key" if answer.status_code in (401, 403) else None
            self.say.error(wrong.get("code") or "refused", message, remedy)
            return None
        return found


def _where(
    url: Url = None,
    uds: Uds = None,
    admin_key: Annotated[
        str | None, typer.Option("--admin-key", help="Default: MLX_SERVING_ADMIN_KEY.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> Server:
    from mlx_serving.cli.say import Say

    return Server(where(url, uds), admin_key, Say(json))


def of_a_server(command: Callable[..., int]) -> Callable[..., None]:
    """A typer command of one whose first parameter is the server: with the flags that find it."""
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    where = inspect.signature(_where, eval_str=True).parameters

    @functools.wraps(command)
    def run(**values: Any) -> None:
        server = _where(**{name: values.pop(name) for name in where})
        raise typer.Exit(command(server, **values))

    parameters = [*own, *where.values()]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run
