"""Time as an argument: the one place that reads the system's clocks."""

from __future__ import annotations

import time
from collections.abc import Callable

Clock = Callable[[], float]
"""Monotonic seconds from an arbitrary zero."""

monotonic: Clock = time.monotonic
wall: Clock = time.time
"""Seconds since the epoch."""
