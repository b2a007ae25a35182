"""Critical requests that keep coming: steps are kept short for the next one, before it is there.

A critical request waits for the steps that are under way when it comes. Only what those were allowed to
be helps it, so for some time after each one a step is launched when the one before it has ended, and
others' prompts are computed in shorter chunks.
"""

from __future__ import annotations

import math

LASTS_S = 30.0
"""Who comes less often than that waits as long as anybody would."""
SHORT_TOKENS = 64
"""Of others' prompts in a step: fewer would cost throughput, since each chunk reads the weights again."""


class Vigil:
    def __init__(self) -> None:
        self._until_s = -math.inf

    def prolong(self, now_s: float) -> None:
        """A critical request has come."""
        self._until_s = now_s + LASTS_S

    def lasts(self, now_s: float) -> bool:
        return now_s < self._until_s
