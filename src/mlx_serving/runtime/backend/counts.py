"""How often each token occurs in the sequences with penalties, on the device.

A sequence whose penalties look back over a window only has the window's tokens in a ring: the one
that a new token pushes out is counted no more.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np


@dataclass(slots=True)
class _Window:
    size: int
    prompt_len: int
    length: int
    """Of the sequence so far."""


class Counts:
    """Tables `[slots, vocabulary]` int32, a slot for each sequence that asks."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab = vocab_size
        self._free: list[int] = []
        self._output: mx.array | None = None
        self._prompt: mx.array | None = None
        self._windows: dict[int, _Window] = {}
        """By slot."""
        self._rings = mx.zeros((0, 1), mx.int32)
        """`[slots, longest window]`: a windowed sequence's token at position p is at p modulo its window."""

    def take(self, token_ids: Sequence[int], prompt_len: int, window: int | None) -> int:
        """A slot for a sequence of these tokens. `window`: how many of the last count; None: all."""
        if not self._free:
            self._grow()
        slot = self._free.pop()
        assert self._output is not None and self._prompt is not None
        begin = 0 if window is None else max(0, len(token_ids) - window)
        self._prompt[slot] = self._histogram(token_ids[begin:prompt_len])
        self._output[slot] = self._histogram(token_ids[max(begin, prompt_len) :])
        if window is not None:
            self._windows[slot] = _Window(window, prompt_len, len(token_ids))
            self._fill(slot, window, token_ids, begin)
        return slot

    def give_back(self, slot: int) -> None:
        self._windows.pop(slot, None)
        self._free.append(slot)

    def tables(self) -> tuple[mx.array, mx.array]:
        """Of outputs and of prompts."""
        assert self._output is not None and self._prompt is not None
        return self._output, self._prompt

    def append(self, slot: int, token_ids: Sequence[int]) -> None:
        """The slot's sequence has got these, whose ids the host knows."""
        if slot in self._windows:
            for token_id in token_ids:
                self.add((slot,), ints((slot,)), ints((token_id,)))
        else:
            self.add((), ints([slot] * len(token_ids)), ints(token_ids))

    def add(self, slots: Sequence[int], at: mx.array, tokens: mx.array) -> None:
        """One token for each of `slots`, which `at` has too, on the device."""
        assert self._output is not None
        self._output = self._output.at[at, tokens].add(mx.array(1, mx.int32))
        if self._windows:
            some = [i for i, slot in enumerate(slots) if slot in self._windows]
            if some:
                self._push_out([slots[i] for i in some], tokens[ints(some)])

    def _push_out(self, slots: Sequence[int], tokens: mx.array) -> None:
        assert self._output is not None and self._prompt is not None
        windows = [self._windows[slot] for slot in slots]
        rows, cells = ints(slots), ints(w.length % w.size for w in windows)
        gone = self._rings[rows, cells]
        known = gone < self._vocab
        gone = mx.minimum(gone, self._vocab - 1)
        leaving = [w.length - w.size for w in windows]
        pairs = list(zip(leaving, windows, strict=True))
        outputs = known * ints(-(at >= w.prompt_len) for at, w in pairs)
        prompts = known * ints(-(0 <= at < w.prompt_len) for at, w in pairs)
        self._output = self._output.at[rows, gone].add(outputs)
        self._prompt = self._prompt.at[rows, gone].add(prompts)
        self._rings[rows, cells] = tokens
        for window in windows:
            window.length += 1

    def _fill(self, slot: int, size: int, token_ids: Sequence[int], begin: int) -> None:
        assert self._output is not None
        slots, width = self._output.shape[0], max(self._rings.shape[1], size)
        if self._rings.shape != (slots, width):
            more = [(0, slots - self._rings.shape[0]), (0, width - self._rings.shape[1])]
            self._rings = mx.pad(self._rings, more)
        ring = np.zeros(width, np.int32)
        for position in range(begin, len(token_ids)):
            ring[position % size] = token_ids[position]
        self._rings[slot] = mx.array(ring)

    def _grow(self) -> None:
        old = 0 if self._output is None else self._output.shape[0]
        new = max(1, old)
        zeros = mx.zeros((new, self._vocab), mx.int32)
        if self._output is None or self._prompt is None:
            self._output, self._prompt = zeros, mx.zeros_like(zeros)
        else:
            self._output = mx.concatenate([self._output, zeros])
            self._prompt = mx.concatenate([self._prompt, zeros])
        self._free += range(old, old + new)

    def _histogram(self, token_ids: Sequence[int]) -> mx.array:
        ids = np.asarray(token_ids, dtype=np.int64)
        counts = np.bincount(ids[ids < self._vocab], minlength=self._vocab)
        return mx.array(counts.astype(np.int32))


def ints(values: Iterable[int]) -> mx.array:
    return mx.array([int(value) for value in values], dtype=mx.int32)
