"""Rows that follow a grammar: the masks that their draws need, and the tokens that masks foretell.

A mask needs the token before it, which may still be on the device: a row remembers which line of which
forward pass draws it, and reads it when the next mask is asked for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

from mlx_serving.errors import MLXServingError
from mlx_serving.runtime.backend.pending import Forward
from mlx_serving.runtime.core.plan import MAX_DEPTH, MAX_FORCED, Forced, Matcher, RowStart


@dataclass(slots=True)
class _Row:
    """Its matcher, and where the token is that it has not seen yet."""

    matcher: Matcher
    foreseeable: bool = False
    drawn: tuple[Forward, int] | None = None
    """(forward, line): the token may still be on the device."""
    recent: deque[int] = field(default_factory=partial(deque, maxlen=MAX_DEPTH))
    """The last tokens that it has seen: the host may know fewer."""

    def mask(self) -> bytes | None:
        if self.drawn is not None:
            forward, line = self.drawn
            token = forward.tokens()[line]
            self.matcher.accept(token)
            self.recent.append(token)
            self.drawn = None
        return self.matcher.mask()

    def foresee(self, forward: Forward, line: int) -> Forced | None:
        """What follows the token that the forward pass will draw, and that token. It is accepted."""
        run = self.matcher.forced(MAX_FORCED) if self.foreseeable else []
        if not run:
            return None
        forward.foreseen.add(line)
        before = tuple(self.recent)
        self.recent.extend(run)
        seq_id = forward.seq_ids[line]
        if len(run) == 1 or seq_id is None:
            return None
        return Forced(seq_id, forward.positions[line] - len(before), (*before, *run))


class GrammarRows:
    """`foresight`: whether tokens may be told before they are drawn."""

    def __init__(self, foresight: bool) -> None:
        self._foresight = foresight
        self._rows: dict[int, _Row] = {}
        self._foreseen: list[Forced] = []
        """Not yet told."""

    def start(self, start: RowStart) -> None:
        if start.constraint is not None:
            matcher = start.constraint.matcher(start.token_ids[start.prompt_len :])
            self._rows[start.row] = _Row(matcher, self._foresight and start.foreseeable)

    def free(self, row: int) -> None:
        self._rows.pop(row, None)

    def move(self, source: int, target: int) -> None:
        if source in self._rows:
            self._rows[target] = self._rows.pop(source)

    def reset(self) -> None:
        self._rows.clear()
        self._foreseen.clear()

    def among(self, rows: Iterable[int | None]) -> bool:
        """Whether a draw from these lines needs masks."""
        return bool(self._rows) and any(row in self._rows for row in rows)

    def masks(self, forward: Forward) -> dict[int, bytes]:
        """By line. What cannot go on is noted in the forward pass, what is foretold here."""
        masks = {}
        for line, row in enumerate(forward.rows):
            followed = None if row is None else self._rows.get(row)
            if followed is None:
                continue
            try:
                mask = followed.mask()
            except MLXServingError as error:
                forward.errors[line] = error
                continue
            if mask is not None:
                masks[line] = mask
                if (forced := followed.foresee(forward, line)) is not None:
                    self._foreseen.append(forced)
        return masks

    def drew(self, forward: Forward) -> None:
        """Its tokens are drawn, but those that were known before."""
        for line, row in enumerate(forward.rows) if self._rows else ():
            if row in self._rows and line not in forward.foreseen:
                self._rows[row].drawn = forward, line

    def foreseen(self) -> list[Forced]:
        """Since the last time."""
        told, self._foreseen = self._foreseen, []
        return told
