"""Whether a worker is stuck: a pure function of what it was last heard to do.

Two clocks run for each worker. `silent_s` counts since any frame of it: a thread in the worker
repeats the phase every second while it computes or loads, so silence means that the whole
process stands still (stopped, swapped out, deadlocked). `phase_s` counts since the phase last
got on: a step came back, a load went from one phase to the next. A long load and a long step are
therefore no hang until their own deadlines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Phase = Literal["starting", "idle", "loading", "compiling", "stepping"]


@dataclass(frozen=True, slots=True)
class Deadlines:
    hello_s: float = 30.0
    """From the start of the process to its first frame."""
    silence_s: float = 60.0
    """Without any frame, in any later phase."""
    load_s: float = 600.0
    """In each of the phases loading and compiling, of one model."""
    step_s: float = 300.0
    """From one step's end to the next one's."""

    @property
    def tick_s(self) -> float:
        """How often to look."""
        return min(1.0, min(self.hello_s, self.silence_s, self.load_s, self.step_s) / 4)


@dataclass(frozen=True, slots=True)
class Vitals:
    phase: Phase
    silent_s: float
    phase_s: float


def stuck(deadlines: Deadlines, vitals: Vitals) -> str | None:
    """Why the worker has to be replaced; None while it does well."""
    phase, phase_s = vitals.phase, vitals.phase_s
    if phase == "starting":
        late = phase_s > deadlines.hello_s
        return f"it said nothing for {deadlines.hello_s:g} s after its start" if late else None
    if vitals.silent_s > deadlines.silence_s:
        return f"no sign of life for {deadlines.silence_s:g} s while {phase}"
    match phase:
        case "idle":
            return None
        case "stepping":
            late = phase_s > deadlines.step_s
            return f"a step took longer than {deadlines.step_s:g} s" if late else None
        case "loading" | "compiling":
            late = phase_s > deadlines.load_s
            return f"{phase} took longer than {deadlines.load_s:g} s" if late else None
