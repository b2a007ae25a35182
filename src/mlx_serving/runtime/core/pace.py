"""How much prefill the running streams can bear in a step: from what steps took, for a target.

A step that decodes takes about `decode_s` for its rows and `s_per_token` for each token of prefill
beside them. Estimates rise fast and fall slowly: a gap that is too long is noticed, a chunk that is
too short is not. What the earlier tokens of a long prompt cost whatever the chunk's length is in
`s_per_token`, which so falls as chunks grow.
"""

from __future__ import annotations

MARGIN = 0.8
"""Of the target: steps vary."""
_UP, _DOWN = 0.5, 0.1
GUESS_S = 0.002
"""Of a token's prefill, until it is measured."""
_JUMP = 2.0
"""One step says at most so many times what is known: it may have been held up by something else."""


class Pace:
    """`max_itl_s`: the longest gap between two tokens that running streams should see; 0: none."""

    def __init__(self, max_itl_s: float = 0.0) -> None:
        self.max_itl_s = max_itl_s
        self.decode_s = 0.0
        """Of a step that only decodes."""
        self.s_per_token = GUESS_S
        """Of prefill."""
        self._guessed = True
        self.least_s = 0.0
        """Of steps that decode beside a chunk that cannot be shorter, of late; 0: there was none."""

    @property
    def out_of_reach(self) -> bool:
        """The target is shorter than what prefill in the smallest chunks takes."""
        return 0 < self.max_itl_s < self.least_s

    def observe(self, decode_rows: int, prefill_tokens: int, step_s: float, grain: int = 0) -> None:
        """How long a step took. `grain`: as in `budget`."""
        if not prefill_tokens:
            if decode_rows:
                self.decode_s = _towards(self.decode_s, step_s, self.decode_s)
            return
        beside = 0.0
        if decode_rows:
            # Nothing else corrects it while a long prompt is computed.
            beside = self.decode_s = min(self.decode_s, step_s)
            if prefill_tokens <= grain:
                self.least_s = _towards(self.least_s, step_s, self.least_s)
        rate = (step_s - beside) / prefill_tokens
        usual = 0.0 if self._guessed else max(self.s_per_token, GUESS_S)
        self.s_per_token = _towards(self.s_per_token, rate, usual)
        self._guessed = False

    def budget(self, decoding: bool, most: int, grain: int) -> int:
        """Prefill tokens for the next step, a multiple of `grain` up to `most`; at least one grain, so
        that every prompt gets on."""
        if not (self.max_itl_s and decoding):
            return most
        room_s = MARGIN * self.max_itl_s - self.decode_s
        tokens = int(room_s / self.s_per_token) if self.s_per_token > 0 else most
        return min(most, max(grain, tokens // grain * grain))


def _towards(known: float, seen: float, usual: float) -> float:
    """`usual` 0: there is nothing to doubt what was seen by."""
    seen = min(seen, _JUMP * usual) if usual else seen
    return known + (_UP if seen > known else _DOWN) * (seen - known)
