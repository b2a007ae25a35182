"""How much prefill the running streams can bear in a step: from what steps took, for a target.

A step that decodes takes about `decode_s` for its rows and `s_per_token` for each token of prefill
beside them. Estimates rise fast and fall slowly: a gap that is too long is noticed, a chunk that is
too short is not.
"""

from __future__ import annotations

MARGIN = 0.8
"""Of the target: steps vary."""
_UP, _DOWN = 0.5, 0.1


class Pace:
    """`max_itl_s`: the longest gap between two tokens that running streams should see; 0: none."""

    def __init__(self, max_itl_s: float = 0.0) -> None:
        self.max_itl_s = max_itl_s
        self.decode_s = 0.0
        """Of a step that only decodes."""
        self.s_per_token = 0.002
        """Of prefill. A guess, until it is measured."""

    def observe(self, decode_rows: int, prefill_tokens: int, step_s: float) -> None:
        """How long a step took."""
        if prefill_tokens:
            beside = self.decode_s if decode_rows else 0.0
            rate = max(step_s - beside, 0.0) / prefill_tokens
            self.s_per_token = _towards(self.s_per_token, rate)
        elif decode_rows:
            self.decode_s = _towards(self.decode_s, step_s)

    def budget(self, decoding: bool, most: int, grain: int) -> int:
        """Prefill tokens for the next step, a multiple of `grain` up to `most`; at least one grain, so
        that every prompt gets on."""
        if not (self.max_itl_s and decoding):
            return most
        room_s = MARGIN * self.max_itl_s - self.decode_s
        tokens = int(room_s / self.s_per_token) if self.s_per_token > 0 else most
        return min(most, max(grain, tokens // grain * grain))


def _towards(known: float, seen: float) -> float:
    return known + (_UP if seen > known else _DOWN) * (seen - known)
