"""How a long fetch or conversion tells its caller where it is; drawn by whoever asks (the CLI)."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called from one thread at a time, though not always the caller's."""

    def start(self, task: str, total_bytes: int) -> None:
        """A new task begins; 0 when its size is not known."""
        ...

    def advance(self, n: int) -> None:
        """`n` more bytes of the current task; negative when a part has to be done again."""
        ...

    def finish(self) -> None:
        """The current task is complete."""
        ...


class Silent:
    def start(self, task: str, total_bytes: int) -> None:
        pass

    def advance(self, n: int) -> None:
        pass

    def finish(self) -> None:
        pass
