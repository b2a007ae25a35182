"""Stop strings across token boundaries, in one pass over the text.

The text is read character by character through an Aho-Corasick automaton, so the answer
does not depend on how tokens cut it. The stop string that is complete first wins, and of
those that end together the longest; the text is cut before it. What might still become
a stop string is held back, and nothing else.
"""

from __future__ import annotations

import functools
import re
from collections import deque
from collections.abc import Sequence


class StopStrings:
    """The automaton for one set of stop strings; shared by every stream that has the set.

    Raises ValueError on an empty stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise ValueError("a stop string cannot be empty")
        self.edges: list[dict[str, int]] = [{}]
        self.depth = [0]
        self.found: list[str | None] = [None]
        """The longest stop string that ends at a state."""
        self.fail = [0]
        for stop in stops:
            self._insert(stop)
        self._link()
        self.starts = re.compile("[" + "".join(map(re.escape, sorted(self.edges[0]))) + "]")
        """Finds the first character that could begin a stop string."""

    def _insert(self, stop: str) -> None:
        state = 0
        for letter in stop:
            following = self.edges[state].get(letter)
            if following is None:
                following = len(self.edges)
                self.edges.append({})
                self.depth.append(self.depth[state] + 1)
                self.found.append(None)
                self.fail.append(0)
                self.edges[state][letter] = following
            state = following
        self.found[state] = stop

    def _link(self) -> None:
        """Breadth first: a state's fallback is the longest of its proper suffixes that is a state."""
        queue = deque(self.edges[0].values())
        while queue:
            state = queue.popleft()
            for letter, following in self.edges[state].items():
                self.fail[following] = self.step(self.fail[state], letter)
                queue.append(following)
            self.found[state] = self.found[state] or self.found[self.fail[state]]

    def step(self, state: int, letter: str) -> int:
        edges, fail = self.edges, self.fail
        while state and letter not in edges[state]:
            state = fail[state]
        return edges[state].get(letter, 0)


@functools.lru_cache(maxsize=64)
def compile_stops(stops: tuple[str, ...]) -> StopStrings:
    """Streams with the same stop strings share the automaton."""
    return StopStrings(stops)


class StopMatcher:
    """One stream's text through the automaton.

    Attributes:
        stop: the stop string that was found; nothing may be pushed after it.
    """

    __slots__ = ("_held", "_state", "_stops", "stop")

    def __init__(self, stops: StopStrings) -> None:
        self._stops = stops
        self._state = 0
        self._held = ""
        self.stop: str | None = None

    def push(self, text: str) -> str:
        """The text that certainly precedes any stop string."""
        assert self.stop is None, "pushed after the end"
        if not self._state and self._stops.starts.search(text) is None:
            return text
        return self._search(text)

    def _search(self, text: str) -> str:
        stops, state = self._stops, self._state
        found, step = stops.found, stops.step
        whole = self._held + text
        for end, letter in enumerate(text, len(self._held) + 1):
            state = step(state, letter)
            if (stop := found[state]) is not None:
                self.stop, self._held = stop, ""
                return whole[: end - len(stop)]
        self._state = state
        cut = len(whole) - stops.depth[state]
        self._held = whole[cut:]
        return whole[:cut]

    def finish(self) -> str:
        """What was held back and turned out not to be a stop string."""
        held, self._held, self._state = self._held, "", 0
        return held
