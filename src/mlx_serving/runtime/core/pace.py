"""How much prefill the running streams can bear in a step: from what steps took, for a target.

A step takes about `decode_s` for the rows that it decodes; a chunk of prefill beside them `chunk_s`
whatever its length (its weights are read again, and the earlier tokens of a long prompt), and
`s_per_token` for each of its tokens. The latter two follow what is measured by normalised least mean
squares: of what a step took longer than was thought, a short chunk's share goes to `chunk_s` and a
long one's to `s_per_token`. Estimates rise fast and fall slowly: a gap that is too long is noticed, a
chunk that is too short is not.
"""

from __future__ import annotations

MARGINS = 0.4, 0.9
"""Of the target is aimed at, at least and at most: steps vary, by how much is the machine's."""
_OVER, _WITHIN = 0.02, 0.0001
"""The margin gives so much for a step beyond the target, and gains so much by one within: it settles
where one in two hundred is beyond."""
_UP, _DOWN = 0.5, 0.1
GUESS_S = 0.002
"""Of a token's prefill, until it is measured."""
_SCALE = 64
"""Tokens of a chunk whose length and whose being there explain as much of an error."""
_JUMP = 2.0
"""One step says at most so many times what is known: it may have been held up by something else."""


class Pace:
    """`max_itl_s`: the longest gap between two tokens that running streams should see; 0: none."""

    def __init__(self, max_itl_s: float = 0.0) -> None:
        self.max_itl_s = max_itl_s
        self.decode_s = 0.0
        """Of a step that only decodes."""
        self.chunk_s = 0.0
        """Of any prefill in a step."""
        self.s_per_token = GUESS_S
        """Of prefill."""
        self._guessed = True
        self.margin = 0.6
        """Part of the target that a step is planned for."""
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
            elif self.max_itl_s:
                gain = -_OVER if step_s > self.max_itl_s else _WITHIN
                self.margin = min(max(self.margin + gain, MARGINS[0]), MARGINS[1])
        self._learn(prefill_tokens, step_s - beside)

    def _learn(self, tokens: int, took_s: float) -> None:
        """What a chunk took by itself."""
        if self._guessed:
            self._guessed = False
            self.s_per_token = took_s / tokens
            return
        thought_s = self.prefill_s(tokens)
        error_s = min(took_s, _JUMP * max(thought_s, GUESS_S * tokens)) - thought_s
        long = tokens / _SCALE
        error_s *= (_UP if error_s > 0 else _DOWN) / (1 + long * long)
        self.chunk_s = max(0.0, self.chunk_s + error_s)
        self.s_per_token = max(0.0, self.s_per_token + error_s * long / _SCALE)

    def prefill_s(self, tokens: int) -> float:
        """What so many tokens of prefill take beside what is decoded."""
        return self.chunk_s + tokens * self.s_per_token

    def budget(self, decoding: bool, most: int, grain: int) -> int:
        """Prefill tokens for the next step, a multiple of `grain` up to `most`; at least one grain, so
        that every prompt gets on."""
        if not (self.max_itl_s and decoding):
            return most
        room_s = self.margin * self.max_itl_s - self.decode_s - self.chunk_s
        tokens = int(room_s / self.s_per_token) if self.s_per_token > 0 else most
        return min(most, max(grain, tokens // grain * grain))


def _towards(known: float, seen: float, usual: float) -> float:
    """`usual` 0: there is nothing to doubt what was seen by."""
    seen = min(seen, _JUMP * usual) if usual else seen
    return known + (_UP if seen > known else _DOWN) * (seen - known)
